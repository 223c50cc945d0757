"""From a config to what is trained on: rows, examples, batches, and what is said of them on the way.

Training and the X-ray (`python -m jlora.data`) both come through here, so that the one shows what the other does.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jlora.adapters.spec import spec_of
from jlora.common import paths
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data import summary
from jlora.data.batches import Batches, plan_batches
from jlora.data.chat import Example, Measured, encode_prompt
from jlora.data.checks import pii
from jlora.data.checks.report import Survey
from jlora.data.conversation import Conversation, Message, Reading
from jlora.data.length_limit import fit
from jlora.data.prepared import prepare
from jlora.data.readers import files
from jlora.models.llama import LlamaConfig

PROMPTS = 20  # rows whose prompt is held against the one that is served


@dataclass(frozen=True)
class Rows:
    """Conversations of a file or directory, read anew each time they are gone through: never all in memory.

    Args:
      key: the config key that names the place.
      held_out: with `eval_share`, which side of the split this is.
      say: takes what the reader has to say of the files.
      count: how many they are, where they were counted before.
    """

    config: Config
    key: str
    held_out: bool = False
    say: Callable[[str], object] = lambda line: None
    count: int = 0

    def __length_hint__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Conversation]:
        config = self.config
        reading = Reading.of(asdict(config))
        for row in files.iter_conversations(getattr(config, self.key), self.key, reading, self.say):
            if config.pii == "mask":
                row = pii.mask(row, config.pii_regions, config.pii_amounts)
            if config.eval_share and summary.is_held_out(row, config.eval_share, config.seed) != self.held_out:
                continue
            if config.system_prompt and row.messages[0].role != "system" and not row.plain:
                row = replace(row, messages=(Message("system", config.system_prompt), *row.messages))
            yield row


def read_rows(config: Config, say: Callable[[str], None] = print) -> tuple[Rows, list[Conversation]]:
    """Training rows and held-out conversations; says what is odd about them.

    Raises:
      UserError: a row that cannot be used; a held-out question that is trained on; nothing on one side of the split;
        personal data, with pii="error".
    """
    rows = Rows(config, "train_data_dir")
    held_out: list[Conversation] = []
    surveys = {"training": Survey(config.pii_regions, config.pii, config.pii_amounts)}
    if config.eval_share or config.eval_data_dir:
        other = (
            Rows(config, "train_data_dir", held_out=True)
            if config.eval_share
            else Rows(config, "eval_data_dir", say=say)
        )
        surveys["held out"] = Survey(config.pii_regions, config.pii, config.pii_amounts)
        held_out = list(surveys["held out"].watch(other))
    summary.refuse_overlap(surveys["training"].watch(replace(rows, say=say)), held_out)
    for name, survey in surveys.items():
        if not survey.count:
            side = "train on" if name == "training" else "hold out"
            raise UserError(f"eval_share={config.eval_share} of these pairs leaves nothing to {side}")
        for line in survey.lines():
            say(f"{name}: {line}")
    return replace(rows, count=surveys["training"].count), held_out


def read_examples(
    config: Config,
    tokenizer: Any,
    ends: frozenset[int],
    rows: Rows | list[Conversation],
    name: str,
    say: Callable[[str], None] = print,
) -> Measured:
    """Conversations as tokens and masks, none longer than `max_seq_length`; says how many there are."""
    prepared = prepare(tokenizer, ends, rows, paths.cache_directory() / "prepared", config.train_on)
    examples, said = fit(prepared, config.max_seq_length, config.overlong, name)
    for line in (summary.summary(name, examples), said, _other_prompts(tokenizer, rows, prepared, name)):
        if line:
            say(line)
    return examples


def _other_prompts(tokenizer: Any, rows: Iterable[Conversation], examples: Measured, name: str) -> str:
    """A sentence where the first rows' prompts are other tokens in training than when they are served."""
    for row, example in zip(itertools.islice(rows, PROMPTS), examples, strict=False):
        prompt = encode_prompt(tokenizer, row.messages[:-1] or row.messages)
        if example.tokens[: len(prompt)].tolist() != prompt:
            return (
                f"{name}: the tokens before an answer depend on the answer ({row.where} among others), so the served "
                "model sees a prompt that it was not trained on: its chat template does not suit its tokenizer"
            )
    return ""


def plan(
    config: Config, model: LlamaConfig, examples: Sequence[Example], held_out: Sequence[Example], devices: int
) -> tuple[int, Batches, Batches | None]:
    """Optimizer steps of the run, its batches, and the held-out batches.

    What all examples begin with is laid once in a row where each of them would make the same of it: not with dropout
    or noise, nor for a base with a sliding window, which counts places of a row.
    """
    heads = model.num_attention_heads * model.head_dim
    accumulated = config.gradient_accumulation_steps
    per_epoch = math.ceil(len(examples) / (config.batch_size * accumulated))
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    share = model.sliding_window is None
    alike: dict[str, Any] = {
        "batch_size": config.batch_size,
        "devices": devices,
        "linear_cost": model.matrices / (2 * heads),
    }
    draws = spec_of(asdict(config)).draws
    batches = plan_batches(
        examples, micro_batches=accumulated, steps=steps, seed=config.seed, share=share and not draws, **alike
    )
    if not held_out:
        return steps, batches, None
    return (
        steps,
        batches,
        plan_batches(held_out, micro_batches=1, steps=None, seed=None, max_shapes=1, share=share, **alike),
    )
