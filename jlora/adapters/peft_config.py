"""Converts adapter_config.json, in which PEFT describes an adapter, to AdapterSpec and back."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic

from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.methods import METHODS, base_method, choices, method_class
from jlora.adapters.provenance import WEIGHTS, recorded_vocabulary
from jlora.adapters.spec import EMBEDDINGS, NO_ADAPTER, TARGETS, AdapterSpec
from jlora.common import hf_names, patterns, typed_json
from jlora.common.errors import UserError
from jlora.common.paths import looked_for
from jlora.common.typed_json import Count, Whole

CONFIG = "adapter_config.json"
# Fields that jlora reads, and fields that do not affect the numbers.
READ = {"peft_type", "target_modules", "exclude_modules"}
READ |= {field for method in METHODS for field in (method.chosen_by[0], *method.reads)}
SILENT = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode init_ia3_weights "
    "megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config".split()
)
FIXED = {"bias": "none"}  # all other fields must be off, because jlora does not support them
Rank = Annotated[Whole, pydantic.Field(gt=0, le=65_536)]
Alpha = Annotated[float, pydantic.Field(ge=-1e6, le=1e6)]
DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")  # initial values that leave the base model unchanged


class Fields(typed_json.Strict):
    """The types of the fields that jlora reads."""

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    r: Rank | None = None
    lora_alpha: Alpha | None = None
    lora_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    layers_to_transform: list[Count] | Whole | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool | None = None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None
    feedforward_modules: list[str] | str | None = None

    @pydantic.model_validator(mode="after")
    def _check_alphas(self) -> "Fields":
        if 0 in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            raise ValueError("lora_alpha or an alpha in alpha_pattern = 0 (expected another number: 0 turns it off)")
        return self


def peft_config(spec: AdapterSpec, base: str, revision: str | None, *, tied: bool) -> dict[str, Any]:
    """Returns the adapter_config.json for the tensors that `peft_io.tensors` returns.

    Args:
      base: the hub id or directory of the base model.
      revision: its commit; None for a directory.
      tied: whether the base model's head is its embedding table.
    """
    own = method_class(spec).peft_fields(spec, tied=tied)
    if "lora_alpha" in own:  # an integer in PEFT, and Ollama reads nothing else
        alphas = {pattern: typed_json.whole(alpha) for pattern, alpha in own["alpha_pattern"].items()}
        own |= {"lora_alpha": typed_json.whole(own["lora_alpha"]), "alpha_pattern": alphas}
    return {
        "peft_type": spec.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": list(spec.target_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        **own,
    }


def read_config_file(directory: Path) -> dict[str, Any]:
    """Returns the content of a PEFT directory's adapter_config.json.

    Raises:
      UserError: the file does not exist, cannot be read, or has a field of the wrong type.
    """
    try:
        config = typed_json.read_object(directory / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        inside = f" Did you mean {directory / 'adapter'}?" if (directory / "adapter" / CONFIG).is_file() else ""
        where = "" if directory.exists() else looked_for(directory)
        raise UserError(
            f"Adapter {directory}: Expected a directory with {CONFIG} and adapter_model.safetensors.{inside}{where}"
        ) from None
    fields, problems = typed_json.parse(Fields, config)
    if problems:
        raise UserError(f"Adapter {directory}: {CONFIG} has {'; '.join(problems)}.")
    return config | fields.model_dump(exclude_unset=True)


def base_of(directory: Path) -> tuple[str, str]:
    """Returns the base model that a PEFT directory names, and its revision ("" if it names none).

    Raises:
      UserError: it names no base model.
    """
    config = read_config_file(directory)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"Adapter {directory}: {CONFIG} does not name its base model (base_model_name_or_path={base!r}). "
            "Pass the base model that it was trained on, with --base."
        )
    return base, config.get("revision") or ""


def read_spec(directory: Path, layers: int) -> AdapterSpec:
    """Returns the spec of a PEFT directory's adapter, for a base model with this many layers.

    Raises:
      UserError: its adapter_config.json has settings that jlora does not support; all of them are listed.
    """
    config = read_config_file(directory)
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    kinds, inits = choices("peft_type"), choices("init_lora_weights")
    problems = [
        f"{field}={value!r}"
        for field, value in config.items()
        if value and field not in READ | SILENT and value != FIXED.get(field)
    ]
    if kind not in kinds:
        problems.append(f"peft_type={kind!r} (expected {' or '.join(kinds)})")
    if init not in (*DRAWN, *inits):
        problems.append(f"init_lora_weights={init!r} (it changes the base model; convert it to plain LoRA with PEFT)")
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        problems.append(f"layers_pattern={config['layers_pattern']!r} (expected none)")
    saved = config.get("modules_to_save") or []
    problems += [f"modules_to_save has {table!r}" for table in saved if table.split(".")[-1] not in EMBEDDINGS]
    problems += [
        f"{field} with peft_type={kind}"
        for field in ("modules_to_save", "trainable_token_indices")
        if config.get(field) and kind in kinds and field in base_method(kind).unused
    ]
    forward = config.get("feedforward_modules") or []
    with _named(directory):
        targets = _targets(config, layers)
    if not isinstance(forward, list) or not {name.split(".")[-1] for name in forward} <= set(TARGETS):
        problems.append(f"feedforward_modules={forward!r} (expected some of {', '.join(TARGETS)})")
    elif mixed := _not_forward(targets, forward):
        problems.append(f"feedforward_modules={forward!r} without {mixed[0]} (expected all modules of a kind, or none)")
    if config.get("ensure_weight_tying") and any(name.split(".")[-1] in EMBEDDINGS for name in targets):
        problems.append("ensure_weight_tying with LoRA on a token table")
    if not targets:
        problems.append(f"target_modules={config.get('target_modules')!r} (expected some of {', '.join(TARGETS)})")
    if problems:
        raise UserError(f"Adapter {directory} has settings that jlora does not support: {'; '.join(problems)}.")
    if any(config.get(field) is None for field in base_method(kind).required):
        raise UserError(f"Adapter {directory}: {CONFIG} must set {' and '.join(base_method(kind).required)}.")
    spec = dataclasses.replace(NO_ADAPTER, target_modules=targets, **_chosen(config, kind))
    spec = dataclasses.replace(spec, **method_class(spec).read_fields(config))
    trained = (token for _, ids in spec.trainable_token_indices for token in ids)
    spec = dataclasses.replace(spec, vocabulary=recorded_vocabulary(directory / WEIGHTS, trained))
    with _named(directory):  # matches all patterns, which may be broken or slow
        for module in hf_names.projections():
            spec.ranks(module, layers), spec.alphas(module, layers)
        if conflicts := find_conflicts(spec):
            raise UserError(f"{CONFIG} has settings that exclude each other: {' '.join(conflicts)}")
    return spec


@contextlib.contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Names the adapter in the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Adapter {directory}: {error}") from None


def _chosen(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns the fields of the spec that select methods of a `peft_type`."""
    chosen: dict[str, Any] = {"peft_type": kind}
    for key, value in (method.chosen_by for method in METHODS if method.peft_type == kind):
        if (bool(config.get(key)) if value is True else config.get(key)) == value:
            chosen[key] = value
    return chosen


def _not_forward(targets: tuple[str, ...], forward: list[str]) -> list[str]:
    """Returns the targets that are not in `feedforward_modules`, but of the same kind as one that is."""
    kinds = {name.split(".")[-1] for name in forward}
    named = [target for target in targets if target.split(".")[-1] in kinds]
    return [target for target in named if not any(target == name or target.endswith(f".{name}") for name in forward)]


def _targets(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    """Returns `target_modules`: unchanged if they are plain names, else expanded; () if one is not a projection."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(TARGETS)
    if isinstance(targets, list) and any(name.split(".")[-1] not in (*TARGETS, *EMBEDDINGS) for name in targets):
        return ()
    if isinstance(targets, list) and not excluded:
        order = {name: i for i, name in enumerate((*TARGETS, *EMBEDDINGS))}
        return tuple(sorted(targets, key=lambda name: (order[name.split(".")[-1]], name)))
    if not isinstance(targets, list | str):
        return ()

    def matches(words: list[str] | str, name: str) -> bool:
        if isinstance(words, str):
            return patterns.matches(words, name)
        return any(name == word or name.endswith(f".{word}") for word in words)

    paths = (path for path in hf_names.NAMES if path[-1] == "weight" and path[-2] in TARGETS)
    names = [name.removesuffix(".weight") for path in paths for name in hf_names.tensor_names(path, (layers,))]
    names += EMBEDDINGS.values()
    return tuple(name for name in names if matches(targets, name) and not matches(excluded, name))
