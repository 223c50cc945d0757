"""Runs an evaluation from files to its report; an interrupted one continues where it stopped."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jlora
from jlora.adapters.peft_config import base_of
from jlora.adapters.provenance import CONFIG, WEIGHTS, metadata
from jlora.bases.hashes import rendered_template_hash, weights_hash
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.common.text_table import text_table
from jlora.config.files import typed
from jlora.config.schema import Config
from jlora.data.checks import pii
from jlora.data.conversation import Conversation
from jlora.data.held_out_split import refuse_overlap
from jlora.data.readers.files import iter_conversations
from jlora.evaluation import forgetting, model_card, page, report
from jlora.evaluation.evaluate import JOURNAL, TRAINING_ROWS, Evaluation, Material, Rows, evaluate, hash_rows
from jlora.evaluation.journal import Journal
from jlora.evaluation.judge import Judge
from jlora.evaluation.subjects import BASE, Subjects, subjects_of
from jlora.evaluation.text_scores import text_scores
from jlora.planning.data_pipeline import RowSource, held_out_source, read_examples
from jlora.serve.generator import Generator
from jlora.serve.loading import load_model

NO_ROWS = (
    "There are no held-out rows to evaluate on. Set --data to rows that no adapter was trained on, or --config to a "
    "config with eval_data_dir or eval_share."
)

NO_TRAINING_ROWS = "Recited training rows were not looked for, because the training rows cannot be read"


class Tasks(NamedTuple):
    """Tasks of lm-evaluation-harness."""

    names: Sequence[str] = ()
    directory: Path | None = None  # of the user's own tasks
    limit: int | None = None  # questions of each, at most
    chat: bool = False  # whether they are asked through the chat template


class Request(NamedTuple):
    """What `jlora evaluate` is asked for."""

    base: str  # "": the first adapter's
    adapters: Mapping[str, Path]
    config: Config | None  # None: the settings that the first adapter was trained with
    data: str  # held-out rows; "": those of the config
    general: str  # general texts of the user's own; "": none
    output: Path | None
    max_new_tokens: int = 0  # of an answer; 0: by the written one
    tasks: Tasks = Tasks()


def evaluate_adapters(request: Request, **options: Any) -> Iterator[str]:
    """Evaluates adapters, writes the report, and yields lines about it.

    Args:
      options: `revision`, `quantize` and `mesh`, as for `load_model`.

    Raises:
      UserError: rows, adapters or base model cannot be read or do not fit, or the output directory has another
        evaluation.
    """
    config = request.config or recorded_config(next(iter(request.adapters.values())))
    if request.data:
        config = dataclasses.replace(config, eval_data_dir=request.data, eval_share=0.0)
    check_settings(config)
    if request.tasks.names and not importlib.util.find_spec("lm_eval"):
        raise UserError("--tasks needs the package lm_eval, which is not installed. Run: pip install 'jlora[lm-eval]'")
    rows, remark = read_rows(config, read_held_out(config))
    own = _own_texts(request.general, config)
    generator = load_model(request.base, request.adapters, **options).generator
    output = request.output or next(iter(request.adapters.values())).resolve().parent / "evaluation"
    subjects = subjects_of(generator)
    inputs = _inputs(generator, request.adapters, rows, own)
    inputs["max_new_tokens"] = str(request.max_new_tokens)
    evaluation = measure(subjects, config, rows, own, output, inputs, request.max_new_tokens)
    base = request.base or base_of(next(iter(request.adapters.values())))[0]
    about = {"jlora": jlora.__version__, "base": base, "adapters": {n: str(p) for n, p in request.adapters.items()}}
    evaluation.remarks.extend([remark] if remark else [])
    if request.tasks.names:
        evaluation.tasks.update(_run_tasks(subjects, request.tasks))
    yield from write_report(evaluation, output, about, request.adapters)


def evaluate_run(
    generator: Generator, config: Config, held_out: Sequence[Conversation], adapter: Path
) -> Iterator[str]:
    """Evaluates the exported adapter of a run, with the base model in memory; writes the report beside it."""
    rows, remark = read_rows(config, held_out)
    adapters, output = {adapter.name: adapter}, adapter.parent / "evaluation"
    inputs = {**_inputs(generator, adapters, rows, ()), "max_new_tokens": "0"}
    evaluation = measure(subjects_of(generator), config, rows, (), output, inputs)
    evaluation.remarks.extend([remark] if remark else [])
    about = {"jlora": jlora.__version__, "base": config.base_model, "adapters": {adapter.name: str(adapter)}}
    yield from write_report(evaluation, output, about, adapters)


def check_settings(config: Config) -> None:
    """Raises a UserError for settings that the evaluation cannot work with, before anything is loaded."""
    text_scores(config.answer_patterns)
    if config.judge_url:
        if not config.judge_model:
            raise UserError("judge_url is set, but judge_model is not. Set it to the judge's name at that address.")
        Judge(config.judge_url, config.judge_model)


def measure(
    subjects: Subjects,
    config: Config,
    rows: Rows,
    own: Sequence[str],
    output: Path,
    inputs: dict[str, str],
    max_new_tokens: int = 0,
) -> Evaluation:
    """Evaluates with these rows and the user's `own` general texts; results are kept in `output` as they come."""
    generator, config = subjects.generator, _unlimited(config, subjects.generator.context)

    def examples(some: Sequence[Conversation], name: str) -> Any:
        given = (config, generator.tokenizer, generator.ends, list(some), name, generator.vocabulary)
        return read_examples(*given) if some else []

    held_out, training = examples(rows.held_out, "held out"), examples(rows.training, "training")
    material = Material(rows, held_out, training, own, max_new_tokens)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Journal(output / JOURNAL, inputs)) as journal:
            return evaluate(subjects, config, material, journal)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from None


def write_report(
    evaluation: Evaluation, output: Path, about: dict[str, Any], adapters: Mapping[str, Path]
) -> Iterator[str]:
    """Writes evaluation.json, .md and .html, and the table into each adapter's README.md; yields lines about it."""
    title = f"Evaluation of {', '.join(name for name in evaluation.models if name != BASE)}"
    texts = {
        "json": report.as_json(evaluation, about),
        "md": report.as_markdown(evaluation, title),
        "html": page.as_html(evaluation, title, about),
    }
    for ending, text in texts.items():
        replace_text(output / f"evaluation.{ending}", text)
    for name, place in adapters.items():
        with contextlib.suppress(OSError):  # a directory that cannot be written, or that has no card
            model_card.add_evaluation(place / "README.md", evaluation, name)
    for name in adapters:
        yield from ("", *report.verdict(evaluation, name))
    yield from ("", *text_table(*report.short_table(evaluation)))
    for header, rows in report.other_tables(evaluation).values():
        yield from ("", *text_table(header, rows))
    yield from ("", *evaluation.remarks)
    yield f"Wrote {output / 'evaluation.html'}, evaluation.md and evaluation.json"


def recorded_config(adapter: Path) -> Config:
    """Returns the settings that an adapter was trained with, as far as its file has them; else the defaults."""
    recorded = json.loads(metadata(adapter / WEIGHTS).get(CONFIG, "{}"))
    known = {key: value for key, value in recorded.items() if key in Config.__dataclass_fields__}
    return Config(**typed({**dataclasses.asdict(Config()), **known})[0])


def read_held_out(config: Config) -> list[Conversation]:
    """Returns the held-out rows of a config; raises a UserError if it has none."""
    source = held_out_source(config) if config.eval_data_dir or config.train_data_dir or config.train_data_mix else None
    rows = list(dataclasses.replace(source, log=print)) if source else []
    if not rows:
        raise UserError(NO_ROWS)
    return rows


def read_rows(config: Config, held_out: Sequence[Conversation]) -> tuple[Rows, str]:
    """Returns the held-out rows with some of the training rows, evenly spaced, and some with personal data.

    Returns:
      The rows, and a remark if the training rows cannot be read, or if held-out rows are among them.
    """
    source, remark = RowSource(config, "train_data_dir"), ""
    if not any(source.paths):
        return Rows(held_out), f"{NO_TRAINING_ROWS}: train_data_dir is not set."
    try:
        count = sum(1 for _ in source)
    except UserError as error:
        return Rows(held_out), f"{NO_TRAINING_ROWS}: {error}"
    try:
        refuse_overlap(iter(source), list(held_out))
    except UserError as error:
        remark = f"Warning: {error}"
    chosen = {i * count // min(count, TRAINING_ROWS) for i in range(min(count, TRAINING_ROWS))}
    training = [row for i, row in enumerate(source) if i in chosen]
    found = (row for row in source if pii.find(row.messages[-1].content, config.pii_regions, config.pii_amounts))
    return Rows(held_out, training, list(itertools.islice(found, TRAINING_ROWS))), remark


def _run_tasks(subjects: Subjects, tasks: Tasks) -> dict[str, dict[str, Any]]:
    from jlora.evaluation.harness import run_tasks  # seconds

    return run_tasks(subjects, tasks.names, tasks.directory, tasks.limit, chat=tasks.chat)


def _unlimited(config: Config, context: int) -> Config:
    """Returns the config with room for every row, unless the config itself says how rows are shortened."""
    if config.overlong != "error":
        return config
    return dataclasses.replace(config, max_seq_length=max(config.max_seq_length, context))


def _own_texts(path: str, config: Config) -> list[str]:
    if not path:
        return []
    options = dataclasses.replace(RowSource(config, "train_data_dir").options, task_type="plain-text", columns={})
    return [row.messages[0].content for row in iter_conversations(path, "--general", options)]


def _inputs(
    generator: Generator,
    adapters: Mapping[str, Path],
    rows: Rows,
    own: Iterable[str],
) -> dict[str, str]:
    """Returns a hash of each thing that the results depend on."""
    return {
        "jlora": jlora.__version__,
        "base model": weights_hash(generator.directory)[:16],
        "base model's form": f"{generator.compute.quantize} {np.dtype(generator.compute.compute_dtype).name}",
        "chat template": rendered_template_hash(generator.tokenizer)[:16],
        **{f"adapter {name}": _hash((place / WEIGHTS).read_bytes()) for name, place in adapters.items()},
        "held-out rows": hash_rows(rows.held_out),
        "training rows": hash_rows([*rows.training, *rows.personal]),
        "general texts": _hash(forgetting.FILE.read_bytes() + "\0".join(own).encode("utf-8", "surrogatepass")),
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
