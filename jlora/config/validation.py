"""Validation of a config, which reports all mistakes at once."""

import dataclasses
import datetime
import math
import re
from pathlib import Path

from jlora.adapters import methods
from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.settings import spec_of
from jlora.adapters.spec import ALL_LINEAR, EMBEDDINGS, TARGETS
from jlora.bases.resolve import is_hub_id
from jlora.common.paths import path_problem
from jlora.config.schema import CHOICES, ENTRIES, NO_HELD_OUT, Config, suggest_nearest
from jlora.data.conversation import PARTS, ROLES, names_complete_row
from jlora.data.readers.encoding import is_encoding
from jlora.distributed.sharding import MESH_AXES

POSITIVE = (
    "max_seq_length lora_rank lora_alpha batch_size gradient_accumulation_steps epochs learning_rate adam_epsilon "
    "logging_steps save_steps loraplus_lr_ratio"
).split()
NOT_NEGATIVE = (
    "max_steps weight_decay max_grad_norm eval_steps early_stopping_patience sample_questions seed neftune_noise_alpha "
    "num_processes max_loss_spike eval_answers_steps"
).split()
BELOW_ONE = "eval_share lora_dropout warmup_ratio adam_beta1 adam_beta2".split()
PATH_KEYS = (
    "train_data_dir eval_data_dir metadata_path base_model chat_template init_adapter resume_from_checkpoint"
).split()
# Keys that may stay set although the chosen `peft_type` ignores them, so that changing it needs no other edit.
HARMLESS = ("lora_rank", "lora_alpha", "feedforward_modules")


def validate(config: Config) -> list[str]:
    """Returns all mistakes in a config, one line each: the key, its value, and what was expected."""
    if problems := _path_problems(config):  # the other checks look at these paths
        return problems
    chosen = [(key, getattr(config, key)) for key in CHOICES if key != "report_to"]
    chosen += [("report_to", name) for name in config.report_to]
    problems = [
        f"{key}={value!r}: Expected one of {', '.join(CHOICES[key])}."
        for key, value in chosen
        if value not in CHOICES[key]
    ]
    rules = [
        (POSITIVE, lambda v: 0 < v < math.inf, "above 0"),
        (NOT_NEGATIVE, lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
        (BELOW_ONE, lambda v: 0 <= v < 1, "that is at least 0 and less than 1"),
    ]
    for keys, holds, expected in rules:
        problems += [
            f"{key}={getattr(config, key)!r}: Expected a number {expected}."
            for key in keys
            if not holds(getattr(config, key))
        ]
    problems += _data_problems(config)
    if not config.output_dir:
        problems.append("output_dir is empty. Set it to a directory for the run.")
    problems += _held_out_problems(config)
    problems += [
        f"mesh has {axis!r}: {size!r}. Expected a number of devices, or -1 for one axis, under {', '.join(MESH_AXES)}."
        for axis, size in config.mesh.items()
        if axis not in MESH_AXES or type(size) is not int or not (size > 0 or size == -1)
    ]
    if list(config.mesh.values()).count(-1) > 1:
        problems.append(f"mesh={config.mesh!r}: Only one axis can be -1, which takes all remaining devices.")
    problems += _adapter_problems(config)
    problems += [
        f"pii_regions has {name!r}: Expected two-letter country codes (ISO 3166), such as CN."
        for name in config.pii_regions
        if not re.fullmatch("[A-Z]{2}", name)
    ]
    if config.overlong == "split" and config.max_seq_length < 2:
        problems.append("max_seq_length=1: Expected 2 or more with overlong=split.")
    if config.revision and not is_hub_id(config.base_model):
        problems.append(
            f"revision={config.revision!r} requires a hub id, but base_model={config.base_model!r} is not one."
        )
    if config.fp16 and config.compute_dtype == "float32":
        problems.append("fp16=True and compute_dtype='float32' contradict each other. Remove one of them.")
    return problems


def _path_problems(config: Config) -> list[str]:
    paths = [(key, getattr(config, key)) for key in (*PATH_KEYS, "output_dir")]
    paths += [("train_data_mix", path) for path in dict(config.train_data_mix)]
    found = [(key, path, path_problem(path)) for key, path in paths]
    return [f"{key}={path[:100]!r}: {problem} Expected a path." for key, path, problem in found if problem]


def _data_problems(config: Config) -> list[str]:
    """Returns the mistakes in the keys that say how rows are read and rendered."""
    problems = []
    if not config.train_data_dir and not config.train_data_mix:
        problems.append("train_data_dir is not set. Set it to the file or directory with the training rows.")
    if config.train_data_dir and config.train_data_mix:
        problems.append("train_data_dir and train_data_mix are both set. Put all sets into train_data_mix.")
    for key, names in (("columns", PARTS), ("role_prefixes", ROLES)):
        problems += [
            f"{key} has {name!r}: {value!r}. Expected text under one of the keys {', '.join(names)}."
            for name, value in getattr(config, key).items()
            if name not in names or not isinstance(value, str) or not value.strip()
        ]
    if not names_complete_row(config.columns):
        problems.append(f"columns={config.columns!r}: Expected prompt and response, or messages, or text.")
    if config.role_prefixes and not {"user", "assistant"} <= config.role_prefixes.keys():
        problems.append(f"role_prefixes={config.role_prefixes!r}: Expected prefixes for both user and assistant.")
    if config.encoding and not is_encoding(config.encoding):
        problems.append(f"encoding={config.encoding!r}: Expected the name of a Python text encoding, such as gb18030.")
    if config.chat_date and not _is_date(config.chat_date):
        problems.append(f"chat_date={config.chat_date!r}: Expected a date as YYYY-MM-DD.")
    return problems


def _held_out_problems(config: Config) -> list[str]:
    if config.eval_data_dir and config.eval_share:
        return ["eval_data_dir and eval_share are both set. Remove one of them."]
    paths = (config.train_data_dir, *dict(config.train_data_mix))
    own = any(Path(path).expanduser().is_dir() for path in paths)  # whose files may be named valid
    missing = config.early_stopping_patience and not (config.eval_data_dir or config.eval_share or own)
    return [NO_HELD_OUT] if missing else []


def _adapter_problems(config: Config) -> list[str]:
    """Returns the mistakes in the keys of the adapter."""
    problems = []
    if not config.target_modules:
        problems.append(f"target_modules=(): Expected one or more of {', '.join(TARGETS)}, or all-linear.")
    known = {
        "target_modules": (*TARGETS, *EMBEDDINGS),
        "feedforward_modules": TARGETS,
        "modules_to_save": tuple(EMBEDDINGS),
    }
    problems += [
        f"{key} has {name!r}. Did you mean {suggest_nearest(name, names)}?"
        for key, names in known.items()
        for name in getattr(config, key)
        if name.split(".")[-1] not in names and not (key == "target_modules" and config.target_modules == ALL_LINEAR)
    ]
    problems += [
        f"{key} has {f'{pattern}={value:g}'!r}: Expected {ENTRIES[key]}."
        for key, entries in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for pattern, value in entries
        if not (_is_pattern(pattern) and 0 < value < math.inf)
    ]
    problems += [
        f"layers_to_transform has {layer}: Expected {ENTRIES['layers_to_transform']}."
        for layer in config.layers_to_transform
        if layer < 0
    ]
    if config.peft_type in CHOICES["peft_type"]:
        problems += [
            f"{key}={getattr(config, key)!r} has no effect with peft_type={config.peft_type}. Remove it."
            for key in methods.base_method(config.peft_type).unused
            if key not in HARMLESS and getattr(config, key) != getattr(Config(), key)
        ]
    if not problems:
        problems = find_conflicts(spec_of(dataclasses.asdict(config)))
    if config.init_adapter and config.resume_from_checkpoint not in ("", "auto"):
        problems.append("init_adapter and resume_from_checkpoint both set a starting point. Remove one of them.")
    return problems


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
