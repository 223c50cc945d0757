"""jlora in Python: train, answer, export, verify. Everything here is also an attribute of `jlora` itself.

config = jlora.load_config("configs/law.py", learning_rate=5e-4)
result = jlora.finetune(config)
model = jlora.load_model(adapters={"law": result.adapter})
print(model.answer("Must a labor contract be in writing?", adapter="law"))
print(jlora.verify_adapter(result.run).sentence)
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from jlora.adapters.provenance import written_step
from jlora.config.files import load_config
from jlora.config.schema import Config
from jlora.distributed import processes
from jlora.distributed.sharding import place, places_of
from jlora.export.exporter import export_adapter, verify_adapter
from jlora.serve.generator import Generator, show_answers
from jlora.serve.loading import Model, load_model
from jlora.steps.compilation import keep_programs
from jlora.training.loop import overfitting
from jlora.training.setup import choose_platform, find_devices
from jlora.training.train import Trained, train

__all__ = ["Config", "Model", "Result", "export_adapter", "finetune", "load_config", "load_model", "verify_adapter"]


@dataclass(frozen=True)
class Result:
    """How a run ended. Losses are of the held-out set, in nats a target; None where nothing was held out."""

    run: Path  # its output_dir
    step: int  # of the exported adapter; of a run that a signal stopped, the last step done
    steps: int  # that the run has in all
    adapter: Path | None  # the PEFT directory; None where a signal stopped the run
    base_loss: float | None  # of the base alone
    best_loss: float | None  # of the adapter at its best evaluation
    stopped: signal.Signals | None


def finetune(config: Config) -> Result:
    """Trains an adapter and exports its best checkpoint, as `jlora train` does.

    Raises:
      UserError: something in the config, the data or the base must change.
    """
    choose_platform(config)
    processes.join(config.coordinator_address, config.num_processes, config.process_id)
    find_devices(config)
    processes.hush()
    keep_programs()
    with processes.surviving(), train(config) as trained:
        progress, step, target = trained.progress, int(trained.state.step), None
        if not trained.stopped:
            step = progress.best_step or step
            target = _finish(trained, step)
        losses = progress.base_loss, progress.best_loss
        return Result(Path(config.output_dir), step, trained.ready.steps, target, *losses, trained.stopped)


def _finish(trained: Trained, step: int) -> Path:
    """Reports the losses, lets base and adapter answer held-out questions, and exports; returns the PEFT directory."""
    ready, progress, programs, adapter = trained.ready, trained.progress, trained.programs, trained.state.lora
    run = Path(ready.config.output_dir)
    if step != int(trained.state.step):
        best = processes.arrays_of_first(lambda: trained.checkpoints.restore_adapter(step, adapter), adapter)
        adapter = place(best, places_of(adapter))
    trained.checkpoints.close()
    if progress.best_loss is not None and progress.base_loss is not None:
        change = progress.best_loss / progress.base_loss - 1
        print(
            f"held-out loss: {progress.base_loss:.4f} before, {progress.best_loss:.4f} at step {step} ({change:+.0%})"
        )
    if progress.worse_since:
        print(overfitting(progress))
    asked = [row for row in ready.asked if not row.plain]
    generator = Generator(
        ready.directory, ready.tokenizer, programs.graphdef, programs.base, ready.compute.compute_dtype
    )
    for line in show_answers(generator, adapter, asked[: ready.config.sample_questions]):
        print(line)
    target = run / "adapter"
    if target.exists() and written_step(target) != step:  # of an earlier end of this run, gone on from since
        target = run / f"adapter-{step}"
    with processes.together():
        if processes.is_first() and not target.exists():
            export_adapter(run, target, step)
    return target
