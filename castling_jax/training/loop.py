"""The training loop."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from castling_jax.training.checkpoints import SCORE, Checkpoints, Progress
from castling_jax.training.console import Console
from castling_jax.training.finite import FiniteCheck
from castling_jax.training.metrics import MetricsWriter
from castling_jax.training.preemption import Preempted
from castling_jax.training.profiling import Profiler
from castling_jax.training.setup import Setup
from castling_jax.training.sharding import shard_batch
from castling_jax.training.state import TrainState
from castling_jax.training.throughput import Meter, peak_flops

SHOWN_IMAGES = 16  # of the first batch, in TensorBoard
STEPS_AHEAD = 3  # so many steps are sent off to the devices before the first of them is done


class Loop:
    """The steps of a run, with what happens between them. All processes make the same calls.

    Args:
      setup: what the run is made of.
      checkpoints: the run's.
      metrics: where figures go; None on all processes but one.
      console: what tells a person.
      should_stop: whether the run is to save after this step, and to end.
      check_lock: raises an InputError when another run writes in the same folder.
    """

    def __init__(
        self,
        setup: Setup,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        console: Console,
        *,
        should_stop: Callable[[int], bool],
        check_lock: Callable[[], None],
    ):
        self._setup, self._config = setup, setup.config
        self._checkpoints, self._metrics, self._console = checkpoints, metrics, console
        self._should_stop, self._check_lock = should_stop, check_lock
        self._measure = setup.task.measures[0]
        self._best = checkpoints.best()

    def run(
        self, state: TrainState, seconds_before: float, profiler: Profiler
    ) -> tuple[TrainState, dict[str, Any], float]:
        """Trains from the state's step to the last.

        Args:
          state: the first state; it is donated.
          seconds_before: what an earlier part of the run took.
          profiler: told of each step.

        Returns:
          The last state, the figures of the last evaluation, and the seconds of the whole run.

        Raises:
          Preempted: `should_stop` said so; the state is saved.
          DeterministicError: a step is not finite.
          InputError: a checkpoint cannot be written, or the lock is lost.
        """
        setup, config, total_steps = self._setup, self._config, self._setup.total_steps
        step = first_step = int(state.step)
        batches = setup.batches(first_step)
        peak = peak_flops()
        macs = (0, 0) if peak is None else setup.macs  # which takes two traces of the model, for this share alone
        meter = Meter(batch_size=config.train.batch_size, step=step, total_steps=total_steps, peak=peak)
        finite = FiniteCheck(
            config.train.on_nonfinite, config.train.max_skips, self._checkpoints.folder, self._console.say
        )
        sent: collections.deque[Any] = collections.deque(maxlen=STEPS_AHEAD)
        figures: dict[str, Any] = {}
        start = saved_at = time.perf_counter()
        while step < total_steps:
            # Send the step off, its batch already on the devices, and wait for the one STEPS_AHEAD before it.
            profiler.before(step, state)
            threshold = setup.threshold_at(step)
            with meter.waiting():
                batch = shard_batch(next(batches), setup.mesh, batch_size=config.train.batch_size)
            if step == 0 and config.logging.tensorboard:
                self._show(state, batch)
            state, result = setup.train_step(state, batch, threshold)
            step += 1
            finite.add(step, result["loss"], result["gradient_norm"])
            sent.append(result["loss"])
            jax.block_until_ready(sent[0])
            self._console.advance()

            # What is due now: a function of the step, so that all processes agree.
            is_last = step == total_steps
            logs = is_last or step % config.logging.every_steps == 0
            evaluates = is_last or step % (config.evaluation.every_epochs * setup.steps_per_epoch) == 0
            stops = self._should_stop(step)
            saves = is_last or stops or step % config.checkpoint.every_steps == 0
            saves = saves or _is_time(config.checkpoint.every_minutes, saved_at, logs=logs)
            if not (logs or evaluates or saves):
                continue

            # Nothing is kept of a run that went wrong.
            finite.check()
            self._check_lock()

            # Figures are the step's own, not averages: an interrupted run writes the same lines.
            line: dict[str, Any] = {}
            if logs:
                line |= self._log(state, result, step) | meter.read(step, macs=macs[threshold >= 1])
                self._console.logged(step, line)
            if evaluates:
                with meter.paused():
                    figures = setup.evaluate(state.weights, threshold)
                name, score = self._measure.name, self._measure.score(figures)
                line |= {name: figures[f"{name}_train_form"], "mask_threshold": threshold, **figures}
                self._console.evaluated(step, float(result["loss"]), result["mask_density"], figures, threshold)
                saves = saves or score > self._best
                self._best = max(self._best, score)
            if line and self._metrics is not None:
                self._metrics.write(step, {"epoch": step / setup.steps_per_epoch} | line)

            if saves:
                saved_at = time.perf_counter()
                seconds = seconds_before + saved_at - start
                judged = {**figures, SCORE: self._measure.score(figures)} if evaluates else None
                self._save(state, Progress(seconds, judged, threshold))
            if stops and not is_last:
                raise Preempted(step)
        jax.block_until_ready(state)
        seconds = seconds_before + (time.perf_counter() - start if step > first_step else 0)
        # A run that was killed between its last step and its end has its figures still to be computed.
        figures = figures or setup.evaluate(state.weights, setup.threshold_at(total_steps - 1))
        return state, figures, seconds

    def _show(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Shows the first images in TensorBoard, as the model is about to see them; all processes prepare them."""
        images = self._setup.images_seen(state, batch, SHOWN_IMAGES)
        if self._metrics is not None and self._metrics.tensorboard is not None:
            self._metrics.tensorboard.show(images)

    def _log(self, state: TrainState, result: dict[str, jax.Array], step: int) -> dict[str, Any]:
        """The figures of a step. A step that is not finite, and was skipped, has no loss and no gradient norm."""
        skipped = state.skipped_steps
        line: dict[str, Any] = {
            # The optimiser counts only the updates that were made.
            "learning_rate": float(self._setup.learning_rate(step - 1 - skipped)),
            "mask_threshold": self._setup.threshold_at(step - 1),
        }
        if self._config.train.on_nonfinite == "skip":
            line["skipped_steps"] = skipped
        values = {name: value.tolist() for name, value in jax.device_get(result).items()}
        if np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"]):
            line |= {name: values[name] for name in ("loss", "gradient_norm", "mask_density")} | values
        return line

    def _save(self, state: TrainState, progress: Progress) -> None:
        if self._metrics is not None:
            self._metrics.flush()  # a run that goes on from this checkpoint has all lines up to it
        self._checkpoints.save(state, progress)


def _is_time(minutes: float, since: float, *, logs: bool) -> bool:
    """Whether it is time for a checkpoint, by process 0's clock.

    The other processes hear of it at a step that is logged: there all of them wait for the devices anyway. Asking at
    every step would make them wait for each other.
    """
    is_time = time.perf_counter() - since >= 60 * minutes
    if jax.process_count() == 1:
        return is_time
    return logs and bool(multihost_utils.broadcast_one_to_all(np.int32(is_time)))
