"""The training loop: steps, logging, evaluation, saving, stopping."""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from jlora.adapters.params import Adapter
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.config.schema import Config
from jlora.data.batches import Batches
from jlora.distributed import processes
from jlora.distributed.stop_signal import StopSignal
from jlora.steps import optim
from jlora.steps.loss_scale import overflow_advice
from jlora.steps.programs import Programs
from jlora.steps.train_step import Metrics, TrainState
from jlora.training import base_loss_cache
from jlora.training.checkpoint import Checkpoints, Progress
from jlora.training.metrics import Logger

SPIKE_WINDOW = 50  # recent losses that each step's loss is compared with
IGNORE_SPIKES = " Set max_loss_spike=0 to continue despite such jumps."
STEPS_IN_FLIGHT = 2  # steps that may be queued on the devices at a time


@dataclasses.dataclass
class TrainingLoop:
    """The loop of one run, from a state to the last step, an early stop, or a signal."""

    config: Config
    programs: Programs
    batches: Batches
    held_out: Batches | None
    steps: int
    checkpoints: Checkpoints
    logger: Logger
    progress: Progress
    stop: StopSignal
    base_loss_file: Callable[[], Path]  # where the base model's held-out loss is cached
    answers: Callable[[Adapter], Iterable[str]]  # to a few held-out questions, as texts
    warm_start: bool  # the initial state is the adapter of another run
    pending: list[Metrics] = dataclasses.field(default_factory=list)  # since the last logged step, on the device
    recent: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))  # losses

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state`, saves checkpoints on the way, and returns the last state."""
        with self.checkpoints.explain_write_errors():
            try:
                with self.stop:
                    return self._run(state)
            except BaseException:
                with contextlib.suppress(UserError):
                    self.checkpoints.wait()  # complete the checkpoint that is being written, whatever failed
                raise

    def _run(self, state: TrainState) -> TrainState:
        config, every = self.config, self.config.eval_steps or self.batches.steps_per_epoch
        if self.held_out is not None and self.progress.base_loss is None:
            self._evaluate_start(state)
        self.logger.restart_clock()
        for done in range(int(state.step) + 1, self.steps + 1):
            if self.stop.requested(done) or self._out_of_patience():
                break
            batch = self.batches[done - 1]
            state, metrics = self.programs.train_step(state, batch, self.logger.print_line)
            self.pending.append(metrics)
            self.logger.step(self.batches.token_count(done - 1))
            if len(self.pending) > STEPS_IN_FLIGHT:  # a longer queue would delay the answer to a signal
                jax.block_until_ready(self.pending[-1 - STEPS_IN_FLIGHT])
            last = done == self.steps
            evaluates = self.held_out is not None and (done % every == 0 or last)
            saves = done % config.save_steps == 0 or last
            if evaluates or saves or done % config.logging_steps == 0:
                self._log_losses(done)
            loss = self._evaluate(state, done) if evaluates else None
            if saves or self._out_of_patience() or (evaluates and self.progress.best_step == done):
                save(self.checkpoints, state, self.progress, loss)
            answers = self.config.eval_answers_steps and done % self.config.eval_answers_steps == 0
            if answers:
                for number, text in enumerate(self.answers(state.lora), 1):
                    self.logger.log_text(done, f"answers/{number}", text)
            if evaluates or saves or answers:
                self.logger.restart_clock()
        if self.stop.received:
            if self.pending:
                self._log_losses(int(state.step))
            save(self.checkpoints, state, self.progress, None)
        if self._out_of_patience():
            self.logger.print_line(f"Stopped early: {plural(self.progress.worse, 'evaluation')} without improvement")
        return state

    def _out_of_patience(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.progress.worse

    def _log_losses(self, done: int) -> None:
        """Fetches and logs the losses since the last logged step; raises a UserError if one diverged or jumped."""
        fetched = jax.device_get(self.pending)
        first = done - len(fetched)
        self.pending.clear()
        for step, metrics in enumerate(fetched, start=first):
            if metrics.broken():
                self._stop_diverged(step, metrics, f"Training diverged at step {step + 1}")
            if self._is_spike(float(metrics.loss)):
                before = f"{max(self.recent):.2f} at most in the {len(self.recent)} steps before"
                self._stop_diverged(step, metrics, f"The loss jumped at step {step + 1} ({before})", IGNORE_SPIKES)
            self.recent.append(float(metrics.loss))
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

    def _is_spike(self, loss: float) -> bool:
        """Returns whether a loss exceeds `max_loss_spike` times the recent ones, and 1: tiny losses jump by chance."""
        factor = self.config.max_loss_spike
        return factor > 0 and len(self.recent) >= SPIKE_WINDOW // 5 and loss > factor * max(*self.recent, 1.0)

    def _stop_diverged(self, step: int, metrics: Metrics, problem: str, advice: str = "") -> None:
        rows = ", ".join(self.batches.examples[i].where for i in self.batches.example_indices(step))
        with processes.fail_together():
            self.checkpoints.wait()
        latest = processes.broadcast_from_first(self.checkpoints.latest)
        saved = "no checkpoint was saved before" if latest is None else f"the latest checkpoint is from step {latest}"
        with processes.fail_together():  # every process has the same numbers
            raise UserError(
                f"{problem}: loss {metrics.loss:g}, gradient norm {metrics.grad_norm:g}, adapter norm "
                f"{metrics.adapter_norm:g}. The batch contains {rows}. This step was not saved; {saved}. Check these "
                f"rows, or lower learning_rate={self.config.learning_rate:g}{overflow_advice(metrics.scaling)}.{advice}"
            )

    def _evaluate_start(self, state: TrainState) -> None:
        assert self.held_out is not None
        file = self.base_loss_file()
        loss = cached = processes.broadcast_from_first(lambda: base_loss_cache.read_loss(file))
        if loss is None:
            neutral = self.programs.neutral(state.lora)
            loss = self.programs.held_out_loss(neutral, self.held_out, self.logger.print_line)
            with processes.fail_together():
                if not math.isfinite(loss):
                    raise UserError(
                        f"The base model's held-out loss is {_not_finite(loss)} before training starts. Check the "
                        f"files of the base model and the held-out rows{overflow_advice(state.scaling)}."
                    )
            if processes.is_first():
                base_loss_cache.write_loss(file, loss)
        self.progress.base_loss = loss
        source = "" if cached is None else " (cached from an earlier run)"
        self.logger.print_line(f"Held-out loss of the base model before training: {loss:.4f}{source}")
        if self.warm_start:
            loss = self.programs.held_out_loss(state.lora, self.held_out, self.logger.print_line)
            self.logger.print_line(f"Held-out loss of the starting adapter: {loss:.4f}")
        self.logger.log(0, eval_loss=loss)

    def _evaluate(self, state: TrainState, done: int) -> float:
        assert self.held_out is not None
        losses = self.programs.held_out_losses(state.lora, self.held_out, self.logger.print_line)
        loss = losses.pop("")
        with processes.fail_together():
            if not math.isfinite(loss):
                rate = f"{self.config.learning_rate:g}{overflow_advice(state.scaling)}"
                raise UserError(
                    f"The held-out loss after step {done} is {_not_finite(loss)}. Lower learning_rate={rate}."
                )
        self.progress.record(done, loss)
        self.logger.log(done, eval_loss=loss, **{f"eval_loss/{name}": each for name, each in losses.items()})
        best = " (best so far)" if self.progress.best_step == done else ""
        by_set = "".join(f", {name} {each:.4f}" for name, each in losses.items())
        self.logger.print_line(f"Step {done}: held-out loss {loss:.4f}{best}{by_set}")
        if self.progress.worse_since == done:
            self.logger.print_line(overfitting_warning(self.progress))
        return loss


def save(checkpoints: Checkpoints, state: TrainState, progress: Progress, eval_loss: float | None) -> None:
    """Gathers the state of all processes and starts to write it as a checkpoint, in the first process."""
    gathered = processes.gather_to_host(state)
    with processes.fail_together():
        if processes.is_first():
            checkpoints.save(gathered, progress, eval_loss)


def overfitting_warning(progress: Progress) -> str:
    """Returns a warning if the last evaluation was worse than the best one; otherwise ""."""
    if progress.worse_since is None:
        return ""
    return f"Held-out loss has risen since step {progress.best_step} (likely overfitting)"


def _not_finite(loss: float) -> str:
    return "NaN" if math.isnan(loss) else "infinite"
