"""The Python API: train, answer, export, verify. Its names are attributes of `jlora` too.

    import jlora
    result = jlora.finetune(jlora.load_config("configs/law.py", learning_rate=5e-4))
    model = jlora.load_model(adapters={"law": result.adapter})
    print(model.answer("Must a labor contract be in writing?", adapter="law"))
    print(jlora.verify_adapter(result.run, result.adapter, result.step).sentence)

The programs call these functions, so results are the same:

    jlora train --config F --config.KEY=V        finetune(load_config(F, KEY=V)), and the next steps are printed
    jlora generate --adapter law=D --prompt Q    load_model(adapters={"law": D}).answer(Q, adapter="law")
    jlora export --run R --step N --for vllm     export_adapter(R, step=N, server="vllm")
    jlora export --run R --verify                verify_adapter(R)

`answer` returns the complete answer, stripped; `jlora generate` prints the same text in pieces. Both are greedy and
stop after 256 tokens by default, and both sample the same text for the same seed. They differ in two ways: without
`adapter`, `answer` uses the base model alone, but `jlora generate` uses the first adapter; and only `jlora generate`
applies output rules.

Errors: UserError says what to change in a config, file or argument (programs exit with code 2). VerificationError says
that an exported adapter does not compute what was trained (programs exit with code 1).
"""

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jlora.adapters import combining
from jlora.adapters.params import Adapter
from jlora.adapters.provenance import exported_step
from jlora.adapters.settings import recorded_spec
from jlora.common.errors import UserError, VerificationError
from jlora.common.plural import plural
from jlora.config import files
from jlora.config.schema import Config
from jlora.config.validation import validate
from jlora.distributed import processes
from jlora.distributed.platforms import find_devices
from jlora.distributed.sharding import place, places_of
from jlora.evaluation.run import check_settings, evaluate_run
from jlora.export.exporter import export_adapter, verify_adapter
from jlora.export.verify import Parity
from jlora.serve.generator import Comparison
from jlora.serve.loading import Model, adapter_set, load_model, make_generator
from jlora.steps.compilation import enable_compilation_cache
from jlora.steps.programs import Programs
from jlora.sweep import run as sweep_run
from jlora.training.loop import overfitting_warning
from jlora.training.run import Answers, TrainedRun, train
from jlora.training.setup import RunSetup, configure_jax

__all__ = [
    "Config",
    "Model",
    "Parity",
    "Result",
    "UserError",
    "VerificationError",
    "export_adapter",
    "finetune",
    "load_config",
    "load_model",
    "verify_adapter",
]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. Losses are mean losses on the held-out set, in nats per target token; None without one."""

    run: Path  # the run's output_dir
    step: int  # the step of the exported adapter; of a stopped run, its last step
    steps: int  # the number of steps of the whole run
    adapter: Path | None  # the PEFT directory; None if the run was stopped
    base_loss: float | None  # of the base model, before training
    best_loss: float | None  # of the adapter, at its best evaluation
    stopped: signal.Signals | None  # SIGINT or SIGTERM if one of them stopped the run, which was saved; else None


def load_config(file: str | Path, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """Reads a `.py` or `.yaml` config, changes some settings, and checks all of them.

    Args:
      file: the config file.
      overrides: changes as on the command line: "--config.lora_rank=8".
      settings: changes as Python values: lora_rank=8, target_modules=("q_proj", "v_proj").

    Raises:
      UserError: the file cannot be read, or settings are unknown or wrong; all wrong values are listed.
    """
    given = {key: "" if value is None else value for key, value in settings.items()}
    words = [
        f"--config.{key}={value if isinstance(value, str | Path) else json.dumps(value)}"
        for key, value in given.items()
    ]
    return files.load_config(str(file), [*overrides, *words])


def finetune(config: Config) -> Result:
    """Trains an adapter and exports its best checkpoint, as `jlora train` does. Prints its progress.

    In the main thread, Ctrl-C or SIGTERM saves a checkpoint after the current step and returns, and a second one ends
    the process at once. Call it again with resume_from_checkpoint="auto" to continue. Call it before anything else uses
    JAX: otherwise `device` has no effect, and the processes of a cluster do not find each other.

    Args:
      config: from `load_config`, or a `Config` of your own.

    Raises:
      UserError: the config, the data or the base model must change; or training diverged. Saved checkpoints remain.
    """
    settings, problems = files.typed(dataclasses.asdict(config))
    config = Config(**settings)
    if problems := problems + validate(config):
        raise UserError("\n  ".join(["The config is not valid:", *problems]))
    config = _start(config)
    if config.evaluate:
        check_settings(config)
    with processes.exit_on_failure(), train(config, _sample_answers) as trained:
        progress, step, adapter = trained.progress, int(trained.state.step), None
        if not trained.stopped:
            step = progress.best_step or step
            adapter = _finish(trained, step)
        losses = progress.base_loss, progress.best_loss
        return Result(Path(config.output_dir), step, trained.setup.steps, adapter, *losses, trained.stopped)


def _start(config: Config) -> Config:
    """Prepares JAX and connects the processes of a run; returns the config with a complete output_dir."""
    configure_jax(config)
    processes.connect(config.coordinator_address, config.num_processes, config.process_id)
    find_devices(config.device)
    processes.mute_all_but_first()
    enable_compilation_cache()
    return dataclasses.replace(config, output_dir=os.path.expanduser(config.output_dir))


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    run: Path  # the sweep's output_dir
    adapter: Path | None  # the winner's PEFT directory; None if the sweep was stopped, or compared groups of rows
    pasted: str  # the winner's settings, as lines of a YAML config
    stopped: signal.Signals | None  # the signal that stopped it


def run_sweep(config: Config) -> SweepResult:
    """Trains all settings of `config.sweep` on one base model, and exports the best, as `jlora sweep` does.

    Raises:
      UserError: the config, the data or the base model must change; or all trainings diverged.
    """
    config = _start(config)
    with sweep_run.prepared(config) as sweep:
        print(f"Training {plural(len(sweep.trials), 'adapter')} for {plural(sweep.steps, 'step')} each", flush=True)
        stopped = sweep_run.train(sweep)
        if stopped:
            return SweepResult(sweep.output, None, "", stopped)
        if sweep.groups:
            sweep_run.finish_groups(sweep)
            return SweepResult(sweep.output, None, "", None)
        winner, pasted = sweep_run.finish(sweep)
        adapter = sweep.output / "adapter"
        if not adapter.exists():
            export_adapter(winner, adapter)
        return SweepResult(sweep.output, adapter, pasted, None)


def _finish(trained: TrainedRun, step: int) -> Path:
    """Reports the losses, shows answers to held-out questions, exports the adapter of a step, and returns its path."""
    setup, progress, adapter = trained.setup, trained.progress, trained.state.lora
    run = Path(setup.config.output_dir)
    if step != int(trained.state.step):
        best = processes.broadcast_arrays_from_first(
            lambda: trained.checkpoints.restore_adapter(step, adapter), adapter
        )
        adapter = place(best, places_of(adapter))
    trained.checkpoints.close()
    if progress.best_loss is not None and progress.base_loss is not None:
        change = progress.best_loss / progress.base_loss - 1
        losses = f"{progress.base_loss:.4f} before training, {progress.best_loss:.4f} after step {step} ({change:+.0%})"
        print(f"Held-out loss: {losses}")
    if warning := overfitting_warning(progress):
        print(f"{warning}. Exporting the checkpoint from step {step}")
    target = run / "adapter"
    if target.exists() and exported_step(target) != step:  # exported when this run ended before and then continued
        target = run / f"adapter-{step}"
    with processes.fail_together():
        if processes.is_first() and not target.exists():
            export_adapter(run, target, step)
    for line in trained.answers(adapter):  # after the export, which is safe then
        print(line)
    if setup.config.evaluate:
        _evaluate(trained, adapter, target)
    return target


def _sample_answers(setup: RunSetup, programs: Programs, adapter: Adapter) -> Answers:
    """Returns the function that answers `sample_questions` held-out questions with the adapter of a step.

    Raises:
      UserError: the memory does not suffice.
    """
    rows = [row for row in setup.held_out_rows if not row.plain][: setup.config.sample_questions]
    if not rows:
        return lambda adapter: ()

    def named(adapter: Adapter) -> dict[str, combining.Form]:
        return {"adapter": (adapter, recorded_spec(setup.record))}

    base, compute = programs.base, setup.compute
    comparison = Comparison(make_generator(setup.directory, setup.tokenizer, base, named(adapter), compute), rows)
    print("Compiling the programs for sample answers", flush=True)
    try:
        comparison.compile_all()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"The memory does not suffice for {plural(len(rows), 'sample answer')}. Set a smaller sample_questions."
        ) from None
    return lambda adapter: comparison.texts(adapter_set(named(adapter)))


def _evaluate(trained: TrainedRun, adapter: Adapter, target: Path) -> None:
    """Evaluates the exported adapter with the base model that is in memory."""
    setup = trained.setup
    if jax.process_count() > 1 or not setup.held_out_rows:
        why = "a run of several processes" if setup.held_out_rows else "a run without held-out rows"
        print(f"evaluate=true has no effect in {why}. Run: jlora evaluate --adapter {target} --data HELD_OUT_ROWS")
        return
    forms = {target.name: (adapter, recorded_spec(setup.record))}
    generator = make_generator(setup.directory, setup.tokenizer, trained.programs.base, forms, setup.compute)
    for line in evaluate_run(generator, setup.config, setup.held_out_rows, target):
        print(line)
