"""The data pipeline: from a config to rows, examples and batches, and the report on them.

Training and the preview (`jlora data`) both use it, so the preview shows exactly what is trained on.
"""

import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jlora.adapters.settings import spec_of
from jlora.common import paths
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.config.schema import NO_HELD_OUT, Config
from jlora.data import preview
from jlora.data.batches import Batches, plan_batches
from jlora.data.chat_template import chat_forms, encode_prompt, has_thinking_switch, states_date
from jlora.data.checks import pii
from jlora.data.checks.report import DataReport
from jlora.data.conversation import Conversation, Message, ReadOptions
from jlora.data.examples import Example, SizedExamples
from jlora.data.held_out_split import is_held_out, refuse_overlap
from jlora.data.length_limit import limit_length
from jlora.data.loss_mask import encode_conversation
from jlora.data.mixture import Mixture, mix, read_share
from jlora.data.readers import files, splits
from jlora.data.token_cache import load_or_tokenize
from jlora.data.tokenizer import THINKING, check_embedded
from jlora.models.model_config import ModelConfig

LISTED = 20  # new tokens that a message lists
PROMPTS = 20  # rows whose prompt in training is compared with the served prompt


@dataclass(frozen=True)
class RowSource:
    """The conversations of a file or directory, read again on each iteration, so that they never fill the memory.

    Args:
      key: the config key that holds the path.
      held_out: whether these are the held-out rows of `train_data_dir`, or its training rows.
      log: receives the reader's remarks on the files.
      count: the number of rows if they were counted before, else 0.
      reasoning: how many of them have reasoning that is learned.
      tools: how many of them define tools.
      group_column: the column that `Conversation.group` is from.
    """

    config: Config
    key: str
    held_out: bool = False
    log: Callable[[str], object] = lambda line: None
    count: int = 0
    reasoning: int = 0
    tools: int = 0
    group_column: str = ""

    def __length_hint__(self) -> int:
        return self.count

    @property
    def options(self) -> ReadOptions:
        """The config's settings for reading files."""
        return replace(ReadOptions.from_config(asdict(self.config)), group_column=self.group_column)

    @property
    def use(self) -> str:
        """Which files of the directory are read, if their names say what they are for."""
        if self.key == "eval_data_dir":
            return splits.EVAL
        return splits.HELD_OUT if self.held_out and not self.config.eval_share else splits.TRAIN

    @property
    def paths(self) -> list[str]:
        """The path of each set."""
        return list(dict(self.config.train_data_mix)) if self.is_mixed else [getattr(self.config, self.key)]

    @property
    def is_mixed(self) -> bool:
        """Whether these are the rows of train_data_mix."""
        return self.key == "train_data_dir" and bool(self.config.train_data_mix)

    def hash(self) -> str:
        """Returns the hash of the files that are read."""
        hashes = [files.hash_files(path, self.key, self.options, self.use) for path in self.paths]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __iter__(self) -> Iterator[Conversation]:
        for path in self.paths:
            if len(self.paths) > 1 and self.use == splits.HELD_OUT and not self.has_held_out(path):
                continue
            for row in self._rows(path):
                yield replace(row, source=path) if self.is_mixed else row

    def has_held_out(self, path: str) -> bool:
        """Returns whether a set has held-out files, by their names."""
        return bool(splits.find_splits(path, self.key, self.options).files(splits.HELD_OUT))

    def _rows(self, path: str) -> Iterator[Conversation]:
        config = self.config
        for row in files.iter_conversations(path, self.key, self.options, self.log, self.use):
            if config.pii == "mask":
                row = pii.mask(row, config.pii_regions, config.pii_amounts)
            if config.eval_share and is_held_out(row, config.eval_share, config.seed) != self.held_out:
                continue
            if config.system_prompt and row.messages[0].role != "system" and not row.plain:
                row = replace(row, messages=(Message("system", config.system_prompt), *row.messages))
            yield row


def held_out_source(config: Config) -> RowSource | None:
    """Returns the held-out rows: of `eval_data_dir`, a share of the training rows, or held-out files beside these."""
    if config.eval_data_dir:
        return RowSource(config, "eval_data_dir")
    own = RowSource(config, "train_data_dir", held_out=True)
    return own if config.eval_share or any(map(own.has_held_out, own.paths)) else None


def read_rows(config: Config, log: Callable[[str], None] = print) -> tuple[RowSource, list[Conversation]]:
    """Returns training rows and held-out conversations, and logs the data quality report on them.

    Raises:
      UserError: a row cannot be used; a held-out question is also trained on; one side of the split is empty; there is
        personal data and pii is "error"; or early stopping has no held-out rows.
    """
    rows, other = RowSource(config, "train_data_dir"), held_out_source(config)
    if config.early_stopping_patience and not other:
        raise UserError(NO_HELD_OUT)
    _log_splits(config, log)
    held_out: list[Conversation] = []
    pii_settings = config.pii_regions, config.pii, config.pii_amounts
    reports = {"training": DataReport(*pii_settings)}
    if other:
        reports["held out"] = DataReport(*pii_settings)
        held_out = list(reports["held out"].inspect(other if config.eval_share else replace(other, log=log)))
    refuse_overlap(reports["training"].inspect(replace(rows, log=log)), held_out)
    for name, report in reports.items():
        if not report.count:
            side = "no training rows" if name == "training" else "no held-out rows"
            raise UserError(f"eval_share={config.eval_share} leaves {side}. Choose another share, or add rows.")
        for line in report.lines():
            log(f"{name}: {line}")
    report = reports["training"]
    return replace(rows, count=report.count, reasoning=report.reasoning, tools=report.tools), held_out


def fix_template_settings(
    config: Config, tokenizer: Any, rows: RowSource, log: Callable[[str], None] = print
) -> Config:
    """Returns the config with the settings that the chat template asks for; the tokenizer then renders with them."""
    if states_date(tokenizer):
        config = replace(config, chat_date=tokenizer.chat_date)
        log(f"The chat template states the date; chat_date={config.chat_date} is fixed for this run")
    if has_thinking_switch(tokenizer) and config.enable_thinking == "auto":
        config = replace(config, enable_thinking="true" if rows.reasoning else "false")
        why = (
            f"{plural(rows.reasoning, 'row', ('has', 'have'))} reasoning" if rows.reasoning else "no row has reasoning"
        )
        log(f"enable_thinking={config.enable_thinking}, because {why}. Serve the adapter with the same setting")
    tokenizer.thinking = THINKING.get(config.enable_thinking)
    if rows.tools and tokenizer.chat_template and not chat_forms(tokenizer).tools:
        log(f"The chat template has no place for tools; the definitions in {plural(rows.tools, 'row')} are left out")
    return config


def _log_splits(config: Config, log: Callable[[str], None]) -> None:
    """Logs what the files of each directory are used for, if their names say what they are for."""
    instead = next((key for key in ("eval_data_dir", "eval_share") if getattr(config, key)), "")
    for key, use in (("train_data_dir", splits.TRAIN), ("eval_data_dir", splits.EVAL)):
        rows = RowSource(config, key)
        for path in filter(None, rows.paths):
            for line in splits.find_splits(path, key, rows.options).remarks(use, instead):
                log(f"{key}: {line}")


def with_new_tokens(config: Config, model: ModelConfig, tokenizer: Any) -> ModelConfig:
    """Returns the base model, with rows for all tokens of its tokenizer if `resize_embeddings` is set.

    Raises:
      UserError: the settings of the adapter do not train the new rows.
    """
    rows = max(tokenizer.get_vocab().values()) + 1 if config.resize_embeddings else 0
    new = list(range(model.vocab_size, rows))
    spec, tied = spec_of(asdict(config)), model.tie_word_embeddings
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    for table in tables:
        if not spec.saves(table, tied=tied) and not set(new) <= set(spec.trained_tokens(table)):
            ids = str(new) if tied else f"{{embed_tokens: {new}, lm_head: {new}}}"
            few = f"trainable_token_indices={ids}, or " if len(new) <= LISTED else ""
            raise UserError(
                f"resize_embeddings adds rows for {plural(len(new), 'token')} of the tokenizer, such as "
                f"{tokenizer.convert_ids_to_tokens(new[0])!r}, but the settings do not train them in {table}. Set "
                f"{few}modules_to_save={','.join(tables)}."
            )
    return replace(model, vocab_size=model.vocab_size + len(new))


def read_examples(
    config: Config,
    tokenizer: Any,
    ends: frozenset[int],
    rows: RowSource | list[Conversation],
    name: str,
    vocab_size: int,
    log: Callable[[str], None] = print,
) -> SizedExamples:
    """Returns the rows as examples of at most `max_seq_length` tokens, and logs a summary of them.

    Raises:
      UserError: a row has a token for which the base model's embedding, of `vocab_size` rows, has none.
    """
    cache = paths.cache_directory() / "prepared"
    tokenized = load_or_tokenize(tokenizer, ends, rows, cache, config.train_on)
    if tokenized.largest >= vocab_size:
        for example in tokenized:
            check_embedded(tokenizer, example.tokens, vocab_size, f"{example.where}: ")
    examples, changes = limit_length(tokenized, config.max_seq_length, config.overlong, name)
    mismatch = _prompt_mismatch(tokenizer, ends, rows, config.train_on, name)
    count, split = operator.length_hint(rows), ""
    if len(tokenized) > count > 0:
        split = (
            f"{name}: {plural(count, 'row')} made {len(tokenized):,} examples, one for each answer, because the chat "
            "template changes earlier turns"
        )
    for line in (preview.examples_summary(name, examples), split, changes, mismatch):
        if line:
            log(line)
    return examples


def context_warning(context: int, sets: Sequence[Any]) -> str:
    """Warns if the longest example of all `SizedExamples` is longer than the base model's context; otherwise ""."""
    longest = max(filter(len, sets), key=lambda examples: examples.sizes[:, 0].max())
    row = int(longest.sizes[:, 0].argmax())
    if (length := longest.sizes[row, 0]) <= context:
        return ""
    return (
        f"Warning: The longest example has {length} tokens ({longest[row].where}), more than the base model's context "
        f"of {context} tokens (by max_position_embeddings and RoPE scaling in its config.json). The base model did not "
        f"learn the positions after that. Set max_seq_length={context} with overlong=truncate, split or drop, or use "
        "a base model with a longer context."
    )


def _prompt_mismatch(
    tokenizer: Any, ends: frozenset[int], rows: Iterable[Conversation], train_on: str, name: str
) -> str:
    """Warns if one of the first rows' prompts is tokenized differently in training and when served; else ""."""
    for row in itertools.islice(rows, PROMPTS):
        example = encode_conversation(tokenizer, ends, row, train_on)
        prompt = encode_prompt(
            tokenizer, row.messages[:-1] or row.messages, row.tools, bool(row.messages[-1].thoughts[0])
        )
        if example.tokens[: len(prompt)].tolist() != prompt:
            return (
                f"{name}: The tokens before an answer depend on the answer (for example in {row.where}), so the served "
                "model sees a prompt that it was not trained on. The chat template does not suit the tokenizer."
            )
    return ""


def make_run_batches(
    config: Config, model: ModelConfig, examples: Sequence[Example], held_out: Sequence[Example], devices: int
) -> tuple[int, Batches, Batches | None]:
    """Returns the optimizer steps of the run, its batches, and the held-out batches.

    A prefix that all examples share is computed once per row if its values cannot differ between them: not with dropout
    or noise, and not for a base model with a sliding window, which depends on the position in the row.
    """
    heads = model.num_attention_heads * model.head_dim
    accumulated = config.gradient_accumulation_steps
    mixture = _mixture(config, examples)
    per_epoch = math.ceil((mixture.taken if mixture else len(examples)) / (config.batch_size * accumulated))
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    share = model.sliding_window is None
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "devices": devices,
        "linear_cost": model.matrices / (2 * heads),
    }
    is_random = spec_of(asdict(config)).draws
    batches = plan_batches(
        examples,
        micro_batches=accumulated,
        steps=steps,
        seed=config.seed,
        share=share and not is_random,
        mixture=mixture,
        **common,
    )
    if not held_out:
        return steps, batches, None
    one_pass: dict[str, Any] = {"micro_batches": 1, "steps": None, "seed": None, "max_shapes": 1, "share": share}
    return steps, batches, plan_batches(held_out, mixture=_mixture(config, held_out), **one_pass, **common)


def _mixture(config: Config, examples: Any) -> Mixture | None:
    """Returns how an epoch mixes the sets that examples are from; None if there is one nameless set."""
    names = getattr(examples, "source_names", [""])
    if names == [""]:
        return None
    return mix(names, examples.sources, {path: read_share(share) or 1.0 for path, share in config.train_data_mix})
