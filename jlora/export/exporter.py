"""Exports a run's checkpoint as a PEFT directory, in the form that a server needs, or as a merged model."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.params import Adapter
from jlora.adapters.peft_config import base_of, peft_config, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter, tensors, write_adapter
from jlora.adapters.provenance import TENSORS, VOCABULARY, WEIGHTS, tensors_hash
from jlora.adapters.settings import recorded_spec
from jlora.adapters.spec import NO_ADAPTER, AdapterSpec
from jlora.bases import hashes
from jlora.bases.hashes import check_base
from jlora.bases.resolve import public_id, resolve_base
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.data.named_templates import find_template
from jlora.data.tokenizer import TEMPLATE_KEYS, load_tokenizer
from jlora.export import live_server
from jlora.export.card import card, provenance_metadata
from jlora.export.gguf_adapter import write_gguf
from jlora.export.live import LiveParity, compare_live
from jlora.export.merged import write_merged
from jlora.export.servers import SERVERS, convert_for_server
from jlora.export.verify import Parity, read_prompts, verify
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve.loading import make_generator
from jlora.training.checkpoint import Checkpoints, read_record

LIVE_PROMPTS = 40  # questions that a running server is asked


def export_adapter(
    run: Path, output: Path | None = None, step: str | int = "best", server: str = "", max_rank: int = 0
) -> Path:
    """Writes the adapter of a run's checkpoint as a PEFT directory, and returns that directory.

    Args:
      run: the run's output_dir.
      output: a new directory; None: RUN/adapter, RUN/adapter-STEP, RUN/adapter-SERVER or RUN/adapter-SERVER-STEP.
      step: "best", "latest", or a step that has a checkpoint.
      server: a key of servers.SERVERS: write the form that it reads, and verify it first; "": PEFT, not verified.
      max_rank: the maximum rank that the server is started with; 0: the server's default.

    Raises:
      UserError: `output` exists, the checkpoint does not exist, or the server cannot load such an adapter.
      VerificationError: with `server`, the adapter does not compute what was trained; nothing is written.
    """
    number = find_step(run, str(step))
    output = output or default_output(run, "adapter" if server in ("", "peft") else f"adapter-{server}", step, number)
    _export(run, number, output, server, max_rank)
    return output


def default_output(run: Path, name: str, wanted: str | int, step: int) -> Path:
    """Returns the default directory of an export: RUN/NAME for the best step, else RUN/NAME-STEP."""
    return run / (name if wanted == "best" else f"{name}-{step}")


def verify_adapter(run: Path, adapter: Path | None = None, step: str | int = "best") -> Parity:
    """Compares an exported adapter, loaded by PEFT, with the checkpoint from which it was exported.

    Args:
      run: the run's output_dir.
      adapter: the PEFT directory; None: where `export_adapter` writes that step.
      step: the step from which it was exported: "best", "latest", or a number.

    Returns:
      The figures, and `sentence`, which sums them up.

    Raises:
      UserError: the adapter cannot be read, or the checkpoint does not exist.
      VerificationError: they disagree, or PEFT warns.
    """
    number = find_step(run, str(step))
    return verify(
        read_record(run, "--run"), *load_adapter(run, number), adapter or default_output(run, "adapter", step, number)
    )


def verify_live(
    run: Path,
    adapter: Path,
    step: int,
    server: str,
    url: str,
    *,
    name: str = "",
    questions: str = "",
    gguf: Path | None,
) -> LiveParity:
    """Compares the answers of a running server with those of the checkpoint from which its adapter was exported.

    The figures are added to parity.json in the adapter's directory.

    Args:
      run: the run's output_dir.
      adapter: the exported directory.
      server: a key of servers.SERVERS.
      url: the server's address, or "spawn" to start one.
      name: the adapter's name in a running server.
      questions: rows to ask, as for `train_data_dir`; "": the run's held-out rows.
      gguf: the base model for llama.cpp, if that is started.

    Raises:
      UserError: the server cannot be started or asked.
      VerificationError: it answers differently.
    """
    record = read_record(run, "--run")
    form, directory, tokenizer = load_adapter(run, step), Path(record["base"]["directory"]), trained_tokenizer(record)
    asked, prompts = read_prompts(record, tokenizer, LIVE_PROMPTS, questions)
    compute = dataclasses.replace(FLOAT32_COMPUTE, quantize=record["config"]["quantize_base"])
    base = hf_loader.load_base_alone(directory, compute, form[1].vocabulary)
    generator = make_generator(directory, tokenizer, base, {live_server.NAME: form}, compute)
    with contextlib.ExitStack() as started:
        dtype = "unknown"
        if url == live_server.SPAWN:
            largest = max(SERVERS[server].usual, form[1].rank)
            url = started.enter_context(live_server.spawned(server, directory, adapter, largest, gguf))
            name, dtype = live_server.NAME, "float32"
        parity = compare_live(url.rstrip("/").removesuffix("/v1"), name, dtype, generator, prompts, asked)
    file = adapter / "parity.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    figures = {**before, "live": {**before.get("live", {}), server: dataclasses.asdict(parity)}}
    replace_text(file, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return parity


def _export(run: Path, step: int, target: Path, server: str, max_rank: int) -> None:
    record = read_record(run, "--run")
    trained = adapter, spec = load_adapter(run, step)
    tokenizer = trained_tokenizer(record)
    if server:
        adapter, spec = convert_for_server(server, adapter, spec, max_rank)
    if server == "llama.cpp":
        print(write_gguf(trained, (adapter, spec), Path(record["base"]["directory"]), target))
        return
    directory = Path(record["base"]["directory"])
    template = tokenizer.chat_template if record["config"]["chat_template"] else ""
    base = record["base"]["hub_id"] or record["base"]["directory"]
    tied = read_config(directory).tie_word_embeddings
    config = peft_config(spec, base, record["base"]["commit"] or None, tied=tied)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        progress = checkpoints.progress(step)
    metadata = provenance_metadata(record, step, progress.base_loss, progress.eval_loss, tokenizer)
    if spec.vocabulary:
        metadata[VOCABULARY] = str(spec.vocabulary)
    metadata[TENSORS] = tensors_hash(tensors(adapter, spec, tied=config.get("ensure_weight_tying") is True))

    def certify(made: Path) -> str:
        parity = verify(record, *trained, made)
        parity = dataclasses.replace(parity, sentence=parity.sentence.replace(str(made), str(target)))
        print(parity.sentence)
        return json.dumps(dataclasses.asdict(parity), indent=2, ensure_ascii=False) + "\n"

    about = card(config, metadata, public_id(record["config"]["base_model"]), own_template=bool(template))
    write_adapter(adapter, spec, config, about, target, metadata, certify if server else None, template)


def load_adapter(run: Path, step: int) -> tuple[Adapter, AdapterSpec]:
    """Reads the adapter of a run's checkpoint."""
    record = read_record(run, "--run")
    spec = recorded_spec(record)
    model_config = read_config(Path(record["base"]["directory"]))
    _, shapes, _ = hf_loader.abstract_model(model_config, spec, FLOAT32_COMPUTE)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        adapter = jax.tree.map(jnp.asarray, checkpoints.restore_adapter(step, shapes))
    return adapter, spec


def trained_tokenizer(record: dict[str, Any]) -> Any:
    """Loads a run's tokenizer and chat template; raises a UserError if they or the base model changed since then."""
    settings = [record["config"][key] for key in TEMPLATE_KEYS]
    tokenizer = load_tokenizer(Path(record["base"]["directory"]), *settings)
    hashes.check_unchanged(record, tokenizer)
    return tokenizer


def find_step(run: Path, wanted: str) -> int:
    """Returns the step of "best", "latest" or a number; without evaluations, "best" is the latest.

    Raises:
      UserError: the checkpoint does not exist.
    """
    if not (run / "checkpoints").is_dir():
        raise UserError(f"--run {run} contains no checkpoints. Expected the output_dir of a run.")
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        steps, latest = checkpoints.steps(), checkpoints.latest()
        if latest is None:
            raise UserError(f"--run {run} contains no complete checkpoint. Continue the training run first.")
        best = checkpoints.best() if wanted == "best" else None
    step = {"best": best, "latest": latest}.get(wanted, int(wanted) if wanted.isdigit() else -1)
    if step not in steps:
        raise UserError(
            f"--step {wanted} has no checkpoint. Available steps: {', '.join(map(str, steps))}, or best, latest."
        )
    return step


def merge_run(run: Path, step: int, target: Path) -> None:
    """Merges the adapter of a run's checkpoint into its base model, and writes the result as one model."""
    record = read_record(run, "--run")
    adapter, spec = load_adapter(run, step)
    tokenizer = trained_tokenizer(record)
    template = tokenizer.chat_template if record["config"]["chat_template"] else ""
    write_merged(Path(record["base"]["directory"]), adapter, spec, target, template)


def merge_directory(adapter: Path | None, base: str, target: Path) -> None:
    """Writes a base model, with the adapter of a PEFT directory merged into it if one is given, as one model."""
    revision, template, spec = "", "", NO_ADAPTER
    if adapter and not base:
        base, revision = base_of(adapter)
    directory = resolve_base(base, revision)
    config, weights = read_config(directory), {}
    if adapter:
        check_base(adapter / WEIGHTS, directory)
        spec = read_spec(adapter, config.num_hidden_layers)
        _, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
        weights = read_adapter(adapter, spec, shapes, tied=config.tie_word_embeddings)
        template = find_template(str(adapter / TEMPLATE)) if (adapter / TEMPLATE).is_file() else ""
    write_merged(directory, weights, spec, target, template)
