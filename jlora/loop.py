"""The training loop: steps, logging, evaluation, saving, stopping."""

import dataclasses
import math
import signal
import sys
from types import FrameType
from typing import Any

import jax
import numpy as np

from jlora import optim
from jlora.checkpoint import Checkpoints, Progress
from jlora.config import Config
from jlora.data.batches import Batches
from jlora.errors import UserError
from jlora.loss_scale import hint
from jlora.metrics import Logger
from jlora.programs import Programs
from jlora.step import Metrics, TrainState


class Stop:
    """Within its `with`, the first SIGINT or SIGTERM is a request that the loop answers; a second one kills."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        print(f"\n{self.signal.name}: stopping after this step, saved; once more stops at once", file=sys.stderr)


@dataclasses.dataclass
class Loop:
    """One run's loop, from a state to its last step, an early stop, or a signal."""

    config: Config
    programs: Programs
    batches: Batches
    held_out: Batches | None
    checkpoints: Checkpoints
    logger: Logger
    progress: Progress
    stop: Stop
    steps: int
    warm: bool  # the state given is another run's adapter
    pending: list[Metrics] = dataclasses.field(default_factory=list)  # since the last logged step, on the device

    def run(self, state: TrainState) -> TrainState:
        """Trains; every state that counts is saved on the way."""
        try:
            with self.stop:
                return self._run(state)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"the run could not be written: {self.checkpoints.cannot_write(error)}") from error

    def _run(self, state: TrainState) -> TrainState:
        config, every = self.config, self.config.eval_steps or self.batches.steps_per_epoch
        if self.held_out is not None and self.progress.base_loss is None:
            self._evaluate_start(state)
        self.programs.after_compiling = self.logger.restart_clock
        self.logger.restart_clock()
        for done in range(int(state.step) + 1, self.steps + 1):
            if self.stop.signal or self._given_up():
                break
            batch = self.batches[done - 1]
            state, metrics = self.programs.train_step(state, batch, self.logger.say)
            self.pending.append(metrics)
            self.logger.step(int(np.count_nonzero(batch.segments)))
            last = done == self.steps
            evaluates = self.held_out is not None and (done % every == 0 or last)
            saves = done % config.save_steps == 0 or last
            if evaluates or saves or done % config.logging_steps == 0:
                self._log_losses(done)
            loss = self._evaluate(state, done) if evaluates else None
            if saves or self._given_up() or (evaluates and self.progress.best_step == done):
                self.checkpoints.save(state, self.progress, loss)
            if evaluates or saves:
                self.logger.restart_clock()
        if self.stop.signal:
            if self.pending:
                self._log_losses(int(state.step))
            self.checkpoints.save(state, self.progress, None)
        if self._given_up():
            self.logger.say(f"stopped early: {self.progress.worse} evaluations without a better one")
        return state

    def _given_up(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.progress.worse

    def _log_losses(self, done: int) -> None:
        """Brings the losses since the last time to the host, once; stops where one is not a number."""
        fetched = jax.device_get(self.pending)
        first = done - len(fetched)
        self.pending.clear()
        for step, metrics in enumerate(fetched, start=first):
            if metrics.broken():
                self._refuse(step, metrics)
        targets = sum(metrics.targets for metrics in fetched)
        scaling, taken = fetched[-1].scaling, [metrics for metrics in fetched if math.isfinite(metrics.grad_norm)]
        updates = done if scaling is None else done - int(scaling.skipped)
        values: dict[str, float | int] = {
            "loss": float(sum(metrics.loss * metrics.targets for metrics in fetched) / targets),
            "learning_rate": float(optim.schedule(self.config, self.steps)(max(updates - 1, 0))),
            "epoch": round(done / self.batches.steps_per_epoch, 4),
        }
        if taken:
            values["grad_norm"] = float(taken[-1].grad_norm)
        if scaling is not None:
            values |= {"loss_scale": float(scaling.scale), "skipped_steps": int(scaling.skipped)}
        if stats := jax.local_devices()[0].memory_stats():  # a CPU has none
            values["device_memory_peak"] = stats["peak_bytes_in_use"]
        self.logger.log(done, **values)

    def _refuse(self, step: int, metrics: Metrics) -> None:
        rows = ", ".join(self.batches.examples[i].where for i in self.batches.chosen(step))
        latest = self.checkpoints.latest()
        kept = "no checkpoint was saved before" if latest is None else f"the latest checkpoint is of step {latest}"
        raise UserError(
            f"training broke down at step {step + 1}, on {rows}: loss {metrics.loss:g}, gradient norm "
            f"{metrics.grad_norm:g}, adapter norm {metrics.adapter_norm:g}. Nothing of it was saved; {kept}. "
            f"Look at these rows, or lower learning_rate={self.config.learning_rate:g}{hint(metrics.scaling)}"
        )

    def _evaluate_start(self, state: TrainState) -> None:
        assert self.held_out is not None
        nothing = self.programs.neutral(state.lora)
        self.progress.base_loss = self.programs.held_out_loss(nothing, self.held_out, self.logger.say)
        if not math.isfinite(self.progress.base_loss):
            raise UserError(f"the base's own held-out loss is {self.progress.base_loss}{hint(state.scaling)}")
        self.logger.say(f"held-out loss of the base, before training: {self.progress.base_loss:.4f}")
        loss = self.progress.base_loss
        if self.warm:
            loss = self.programs.held_out_loss(state.lora, self.held_out, self.logger.say)
            self.logger.say(f"held-out loss of the adapter that it starts from: {loss:.4f}")
        self.logger.log(0, eval_loss=loss)

    def _evaluate(self, state: TrainState, done: int) -> float:
        assert self.held_out is not None
        loss = self.programs.held_out_loss(state.lora, self.held_out, self.logger.say)
        if not math.isfinite(loss):
            rate = f"{self.config.learning_rate:g}{hint(state.scaling)}"
            raise UserError(f"the held-out loss of step {done} is {loss}: lower learning_rate={rate}")
        self.progress.record(done, loss)
        self.logger.log(done, eval_loss=loss)
        best = " (best so far)" if self.progress.best_step == done else ""
        self.logger.say(f"step {done}: held-out loss {loss:.4f}{best}")
        if self.progress.worse_since == done:
            self.logger.say(overfitting(self.progress))
        return loss


def overfitting(progress: Progress) -> str:
    """The plain sentence for a held-out loss that has turned up; empty where it has not."""
    if progress.worse_since is None:
        return ""
    return f"overfitting since step {progress.worse_since}; the best checkpoint is {progress.best_step}"
