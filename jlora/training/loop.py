"""The training loop: steps, logging, evaluation, saving, stopping."""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable

import jax

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.batches import Batches
from jlora.distributed import processes
from jlora.distributed.processes import Stop
from jlora.steps import optim
from jlora.steps.loss_scale import hint
from jlora.steps.programs import Programs
from jlora.steps.step import Metrics, TrainState
from jlora.training.checkpoint import Checkpoints, Progress
from jlora.training.known import Known
from jlora.training.metrics import Logger

RECENT = 50  # losses that a step's is held against
GO_ON = "; max_loss_spike=0 goes on all the same"
AHEAD = 2  # steps that are given to the devices before an earlier one is done


@dataclasses.dataclass
class Loop:
    """One run's loop, from a state to its last step, an early stop, or a signal."""

    config: Config
    programs: Programs
    batches: Batches
    held_out: Batches | None
    steps: int
    checkpoints: Checkpoints
    logger: Logger
    progress: Progress
    stop: Stop
    base_loss: Callable[[], Known]  # of the base alone on the held-out examples
    warm: bool  # the state given is another run's adapter
    pending: list[Metrics] = dataclasses.field(default_factory=list)  # since the last logged step, on the device
    recent: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=RECENT))  # losses

    def run(self, state: TrainState) -> TrainState:
        """Trains; every state that counts is saved on the way."""
        with self.checkpoints.writable():
            try:
                with self.stop:
                    return self._run(state)
            except BaseException:
                with contextlib.suppress(UserError):
                    self.checkpoints.wait()  # what is being written when all else fails is to be whole
                raise

    def _run(self, state: TrainState) -> TrainState:
        config, every = self.config, self.config.eval_steps or self.batches.steps_per_epoch
        if self.held_out is not None and self.progress.base_loss is None:
            self._evaluate_start(state)
        self.programs.after_compiling = self.logger.restart_clock
        self.logger.restart_clock()
        for done in range(int(state.step) + 1, self.steps + 1):
            if self.stop.asked(done) or self._given_up():
                break
            batch = self.batches[done - 1]
            state, metrics = self.programs.train_step(state, batch, self.logger.say)
            self.pending.append(metrics)
            self.logger.step(self.batches.token_count(done - 1))
            if len(self.pending) > AHEAD:  # else the steps under way would be many, and a signal be answered late
                jax.block_until_ready(self.pending[-1 - AHEAD])
            last = done == self.steps
            evaluates = self.held_out is not None and (done % every == 0 or last)
            saves = done % config.save_steps == 0 or last
            if evaluates or saves or done % config.logging_steps == 0:
                self._log_losses(done)
            loss = self._evaluate(state, done) if evaluates else None
            if saves or self._given_up() or (evaluates and self.progress.best_step == done):
                save(self.checkpoints, state, self.progress, loss)
            if evaluates or saves:
                self.logger.restart_clock()
        if self.stop.signal:
            if self.pending:
                self._log_losses(int(state.step))
            save(self.checkpoints, state, self.progress, None)
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
                self._refuse(step, metrics, f"training broke down at step {step + 1}, on ", "")
            if self._spikes(float(metrics.loss)):
                before = f"{max(self.recent):.2f} at most in the {len(self.recent)} steps before"
                self._refuse(step, metrics, f"the loss, {before}, jumped at step {step + 1}, on ", GO_ON)
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

    def _spikes(self, loss: float) -> bool:
        """Is a loss far above those before it, and above the factor itself? Near zero, losses jump by chance."""
        factor = self.config.max_loss_spike
        return factor > 0 and len(self.recent) >= RECENT // 5 and loss > factor * max(*self.recent, 1.0)

    def _refuse(self, step: int, metrics: Metrics, words: str, way_out: str) -> None:
        rows = ", ".join(self.batches.examples[i].where for i in self.batches.example_indices(step))
        with processes.together():
            self.checkpoints.wait()
        latest = processes.of_first(self.checkpoints.latest)
        kept = "no checkpoint was saved before" if latest is None else f"the latest checkpoint is of step {latest}"
        with processes.together():  # all have these numbers
            raise UserError(
                f"{words}{rows}: loss {metrics.loss:g}, gradient norm {metrics.grad_norm:g}, adapter norm "
                f"{metrics.adapter_norm:g}. Nothing of it was saved; {kept}. Look at these rows, or lower "
                f"learning_rate={self.config.learning_rate:g}{hint(metrics.scaling)}{way_out}"
            )

    def _evaluate_start(self, state: TrainState) -> None:
        assert self.held_out is not None
        kept = self.base_loss()
        loss = known = processes.of_first(kept.get)
        if loss is None:
            loss = self.programs.held_out_loss(self.programs.neutral(state.lora), self.held_out, self.logger.say)
            with processes.together():
                if not math.isfinite(loss):
                    raise UserError(f"the base's own held-out loss is {loss}{hint(state.scaling)}")
            if processes.is_first():
                kept.put(loss)
        self.progress.base_loss = loss
        again = ", as an earlier run had it" if known is not None else ""
        self.logger.say(f"held-out loss of the base, before training: {loss:.4f}{again}")
        if self.warm:
            loss = self.programs.held_out_loss(state.lora, self.held_out, self.logger.say)
            self.logger.say(f"held-out loss of the adapter that it starts from: {loss:.4f}")
        self.logger.log(0, eval_loss=loss)

    def _evaluate(self, state: TrainState, done: int) -> float:
        assert self.held_out is not None
        loss = self.programs.held_out_loss(state.lora, self.held_out, self.logger.say)
        with processes.together():
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


def save(checkpoints: Checkpoints, state: TrainState, progress: Progress, eval_loss: float | None) -> None:
    """Begins to write a checkpoint: the first process does, of what all of them hold."""
    held = processes.whole(state)
    with processes.together():
        if processes.is_first():
            checkpoints.save(held, progress, eval_loss)


def overfitting(progress: Progress) -> str:
    """The plain sentence for a held-out loss that has turned up; empty where it has not."""
    if progress.worse_since is None:
        return ""
    return f"overfitting since step {progress.worse_since}; the best checkpoint is {progress.best_step}"
