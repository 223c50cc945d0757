"""Trains a LoRA adapter: `python -m jlora.train --config configs/law.py [--config.KEY=VALUE ...]`.

This file is the wiring; the loop is in loop.py. Exit codes: 0 done, or saved on SIGTERM; 2 something to change;
130 saved on Ctrl-C.
"""

import dataclasses
import importlib.metadata
import platform
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora import lora, resume, sources
from jlora.adapter_config import read_spec
from jlora.checkpoint import Checkpoints, Progress, read_record, write_record
from jlora.compiling import keep_programs
from jlora.config import Config
from jlora.config_files import config_parser, load_config
from jlora.data import formats
from jlora.data.chat import end_tokens, load_tokenizer
from jlora.data.conversation import Conversation, Reading
from jlora.errors import UserError, run_program
from jlora.export import export_run, settings_of, spec_of
from jlora.forecast import Job, bytes_of, laid_out
from jlora.generator import Generator, show_answers
from jlora.intake import plan, read_examples, read_rows
from jlora.loop import Loop, Stop, overfitting
from jlora.metrics import Logger, loading_bar
from jlora.model import backend, hf
from jlora.model.compute import Compute, default_dtype
from jlora.model.families import read_config
from jlora.model.llama import LlamaConfig
from jlora.peft_format import WEIGHTS, read_adapter, written_step
from jlora.programs import fresh_state, placed_shapes
from jlora.provenance import check_base, fingerprint, source_hash, tokenizer_hash
from jlora.search import ensure_fits, first_fit
from jlora.sharding import check_batch, make_mesh, row_ways
from jlora.sharding import describe as describe_mesh
from jlora.sites import LoraConfig
from jlora.step import TrainState
from jlora.targets import find_target

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}


def main(argv: list[str]) -> None:
    """The command line."""
    parser = config_parser("jlora.train", "Trains a LoRA adapter.")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    kept = [word for word in overrides if not word.startswith(f"--config.{resume.KEY}=")]
    again = [sys.executable, "-m", "jlora.train", "--config", arguments.config, *kept, f"--config.{resume.KEY}=auto"]
    keep_programs()
    train(config, shlex.join(again))


def train(config: Config, again: str) -> None:
    """One run, from files to an adapter; `again` is the command that would continue it."""
    resume.check_output(config)
    rows, held_out_rows = read_rows(config)
    devices = find_devices(config)
    mesh = make_mesh(devices, config.mesh)
    check_batch(mesh, config.batch_size)
    directory = sources.resolve(config.base_model, config.revision)
    model_config, tokenizer = read_config(directory), load_tokenizer(directory, config.chat_template)
    ends = end_tokens(directory, tokenizer)
    examples = read_examples(config, tokenizer, ends, rows, "training")
    held_out = read_examples(config, tokenizer, ends, held_out_rows, "held out") if held_out_rows else []
    steps, batches, eval_batches = plan(config, model_config, examples, held_out, row_ways(mesh))
    device, wish = mesh.devices.flat[0], config.attn_implementation
    compute = choose_compute(config, device)
    longest = max(shape.length for some in (batches, eval_batches) if some for shape in some.shapes)
    attention, why = backend.choose(wish, device, model_config, compute.compute_dtype, longest)
    compute = dataclasses.replace(compute, attention=attention, mesh=mesh)
    config = take_form(config, directory, model_config)
    record = describe(config, directory, tokenizer, mesh, compute)
    spec = spec_of(record["config"])
    start = resume.decide(config, record)
    print(start.message)
    if start.source and start.exact and config.remat == "auto":  # else it would not be bit for bit the same
        config = dataclasses.replace(config, remat=read_record(start.source, resume.KEY)["runtime"]["remat"])
    _, adapter_shapes, base_shapes = hf.abstract(model_config, spec, compute)
    here, layout = find_target("here", devices), laid_out(model_config, examples)
    job = Job(config, model_config, compute, batches.micro_batches, batches.rows, batches.shapes[-1])
    with ThreadPoolExecutor(1) as beside:  # the step compiles while the base is read
        fitted = beside.submit(first_fit, job, here, steps, print)
        size = bytes_of(placed_shapes(base_shapes, mesh, "base"))
        if here.limit is not None and size > here.limit:
            ensure_fits(fitted.result()[0], here, layout, print)
        with loading_bar(size) as bar:
            base = hf.load_base(directory, base_shapes, mesh, bar.update)
        seen, programs = fitted.result()
    ensure_fits(seen, here, layout, print)
    programs.base, record["runtime"]["remat"] = base, seen.job.compute.remat
    adapter = first_adapter(config, spec, adapter_shapes, base, tied=model_config.tie_word_embeddings)

    run, stop = Path(config.output_dir), Stop()
    with resume.claim(run):  # before anything of it is read: another process there would be removing checkpoints
        state, progress = begin(start, fresh_state(adapter, programs.optimizer, mesh, compute.compute_dtype))
        checkpoints, warm = Checkpoints(run), not start.exact and bool(start.source or config.init_adapter)
        if warm:
            checkpoints.save(state, progress, None)  # first of all, so that no restart begins from nothing
        write_record(run, record)
        sizes = len(batches.shapes)
        shapes = (
            f"batches come in {sizes} sizes, each compiled when it first comes" if sizes > 1 else "one size of batch"
        )
        axes = "" if row_ways(mesh) == mesh.shape["data"] == mesh.size else f" ({describe_mesh(mesh)})"
        print(f"{steps} steps on {mesh.size} x {device.device_kind}{axes}; {shapes}")
        print(f"attention: {attention}{why and f' (not {why})'}", flush=True)
        with Logger(run, int(state.step), steps) as logger:
            state = Loop(config, programs, batches, eval_batches, checkpoints, logger, progress, stop, steps, warm).run(
                state
            )
        if stop.signal:
            checkpoints.close()
            print(
                f"stopped after step {int(state.step)} of {steps}; it is saved. To continue:\n  {again}\n"
                f"The adapter so far: {sys.executable} -m jlora.export --run {run} --step latest"
            )
            sys.exit(0 if stop.signal is signal.SIGTERM else 130)
        generator = Generator(directory, tokenizer, programs.graphdef, base, compute.compute_dtype)
        finish(config, run, checkpoints, progress, state, generator, held_out_rows)


def begin(start: resume.Start, fresh: TrainState) -> tuple[TrainState, Progress]:
    """The state and progress that a run begins with: fresh, restored whole, or with only the adapter restored."""
    if start.source is None:
        return fresh, Progress()
    source = Checkpoints(start.source)
    if start.exact:
        state, progress = source.restore(start.step, fresh)
    else:
        state, progress = fresh._replace(lora=source.restore_adapter(start.step, fresh.lora)), Progress()
    source.close()
    return state, progress


def finish(
    config: Config,
    run: Path,
    checkpoints: Checkpoints,
    progress: Progress,
    state: TrainState,
    generator: Generator,
    held_out: list[Conversation],
) -> None:
    """Exports the best adapter, says how it did, and lets base and adapter answer some held-out questions."""
    step = progress.best_step or int(state.step)
    adapter = state.lora if step == int(state.step) else checkpoints.restore_adapter(step, state.lora)
    checkpoints.close()
    if progress.best_loss is not None and progress.base_loss is not None:
        change = progress.best_loss / progress.base_loss - 1
        print(
            f"held-out loss: {progress.base_loss:.4f} before, {progress.best_loss:.4f} at step {step} ({change:+.0%})"
        )
    if progress.worse_since:
        print(overfitting(progress))
    asked = [row for row in held_out if not row.plain]
    for line in show_answers(generator, adapter, asked[: config.sample_questions]):
        print(line)
    target = run / "adapter"
    if target.exists() and written_step(target) != step:  # of an earlier end of this run, gone on from since
        target = run / f"adapter-{step}"
    if not target.exists():
        export_run(run, step, target)
    print(f"adapter of step {step}: {target}")
    if config.system_prompt:
        print(f"it knows one system prompt, so ask it with the same: --system {shlex.quote(config.system_prompt)}")


def find_devices(config: Config) -> list[jax.Device]:
    """The devices that `device` asks for.

    Raises:
      UserError: there are none.
    """
    if config.device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[config.device])
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts where the wanted platform has no plugin
        reason = str(error).strip().split("\n")[0] or "no plugin for it"
        raise UserError(
            f"device={config.device}: JAX finds none here ({reason}). Install jlora[cuda12], jlora[cuda13] or "
            "jlora[tpu] for this machine, or set device=auto"
        ) from None


def choose_compute(config: Config, device: Any) -> Compute:
    """The dtypes of this run: `auto` resolved for a device. What is recomputed follows from the memory, later."""
    auto = default_dtype(device)
    names = {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    param = names[config.param_dtype]
    compute = param if config.compute_dtype == "auto" else names[config.compute_dtype]
    if config.fp16 and config.compute_dtype == "auto":
        compute = jnp.float16 if auto == jnp.float16 else jnp.bfloat16
        if compute == jnp.bfloat16:
            print("fp16: computing in bfloat16, which needs no loss scaling")
    if compute == jnp.float16:
        why = f", since a {device.device_kind} has no bfloat16" if config.compute_dtype == "auto" else ""
        print(f"computing in float16{why}: the loss is scaled, and a step whose gradients overflow is skipped")
    return Compute(param, compute, quantize=config.quantize_base)


def take_form(config: Config, directory: Path, model: LlamaConfig) -> Config:
    """The config with the adapter's form that `init_adapter` has, where it is set.

    Raises:
      UserError: a key asks for what this base does not have.
    """
    layers = model.num_hidden_layers
    if config.init_adapter:
        check_base(Path(config.init_adapter) / WEIGHTS, directory)
        settings = settings_of(read_spec(Path(config.init_adapter), layers))
        form = ", ".join(f"{key}={settings[key]!r}" for key in ("peft_type", "lora_rank", "lora_alpha"))
        print(f"starting from the adapter {config.init_adapter}, in its own form: {form}")
        return dataclasses.replace(config, **settings)
    if problems := spec_of(dataclasses.asdict(config)).problems(hf.projections(), layers):
        raise UserError("\n  ".join([f"{config.base_model} does not fit the config:", *problems]))
    return config


def first_adapter(config: Config, spec: LoraConfig, shapes: lora.Adapter, base: Any, *, tied: bool) -> lora.Adapter:
    """The adapter of step 0: `init_adapter`, or one that does nothing yet."""
    if not config.init_adapter:
        return lora.start(spec, shapes, base, jax.random.key(config.seed))
    return lora.complete(spec, read_adapter(Path(config.init_adapter), spec, shapes, tied=tied), base)


def describe(config: Config, base: Path, tokenizer: Any, mesh: jax.sharding.Mesh, compute: Compute) -> dict[str, Any]:
    """What config.json of the run says: the config, where data and base lie, their hashes, and what computes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy")
    questions = config.eval_data_dir or config.train_data_dir
    reading = Reading.of(dataclasses.asdict(config))
    held_out = config.eval_data_dir
    return {
        "config": dataclasses.asdict(config),
        "data": {
            "train": formats.hash_files(config.train_data_dir, "train_data_dir", reading),
            "held_out": formats.hash_files(held_out, "eval_data_dir", reading) if held_out else "",
            "tokenizer": tokenizer_hash(tokenizer),
            "template": source_hash(tokenizer),
            "questions": formats.place(questions),
        },
        "base": {
            "directory": str(base.resolve()),
            "hub_id": config.base_model if sources.is_hub_id(config.base_model) else "",
            "commit": sources.commit(base),
            "fingerprint": fingerprint(base),
        },
        "versions": {
            "jlora": jlora.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "runtime": {
            "devices": mesh.size,
            "mesh": describe_mesh(mesh),
            "device_kind": mesh.devices.flat[0].device_kind,
            "param_dtype": jnp.dtype(compute.param_dtype).name,
            "compute_dtype": jnp.dtype(compute.compute_dtype).name,
            "attention": compute.attention,
            **({} if config.remat == "auto" else {"remat": config.remat}),
        },
    }


if __name__ == "__main__":
    run_program(main)
