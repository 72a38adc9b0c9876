"""The training loop. Read Loop.run from top to bottom; how a batch changes the state is in step.py."""

import collections
import contextlib
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

SHOWN_IMAGES = 16  # images of the first batch that TensorBoard shows
STEPS_AHEAD = 3  # steps that may be sent to the devices before the first of them is done


class Loop:
    """The steps of a run, with logging, evaluation and checkpoints between them. All processes make the same calls.

    Args:
      setup: the run's parts.
      checkpoints: the run's checkpoints.
      metrics: writer of the figures; None on all processes but one.
      console: prints for the user.
      should_stop: step -> whether the run must save after this step and end.
      check_lock: raises an InputError if another run writes into the same folder.
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
        """Trains from the state's step to the last step.

        Args:
          state: the state to start from; it is donated.
          seconds_before: seconds that earlier parts of the run took.
          profiler: called before each step.

        Returns:
          (state, figures, seconds): the last state, the last evaluation's figures, and the seconds of the whole run.

        Raises:
          Preempted: `should_stop` returned True; the state is saved.
          DeterministicError: a step is not finite.
          InputError: a checkpoint cannot be written, or the lock is lost.
        """
        setup, config, total_steps = self._setup, self._config, self._setup.total_steps
        step = first_step = int(state.step)
        batches = setup.batches(first_step)
        peak = peak_flops()
        macs = (0, 0) if peak is None else setup.macs  # traces the model twice, only to log the share of the peak
        meter = Meter(batch_size=config.train.batch_size, step=step, total_steps=total_steps, peak=peak)
        finite = FiniteCheck(
            config.train.on_nonfinite, config.train.max_skips, self._checkpoints.folder, self._console.say
        )
        sent: collections.deque[Any] = collections.deque(maxlen=STEPS_AHEAD)
        figures: dict[str, Any] = {}
        compiled: set[bool] = set()
        start = saved_at = time.perf_counter()
        while step < total_steps:
            # Send the step to the devices, then wait for an earlier one: with a few steps in flight the devices never
            # wait for Python, and batches in flight take bounded memory.
            profiler.before(step, state)
            threshold = setup.threshold_at(step)
            with meter.waiting():
                batch = shard_batch(next(batches), setup.mesh, batch_size=config.train.batch_size)
            if step == 0 and config.logging.tensorboard:
                self._show(state, batch)
            is_empty = threshold >= 1  # the mask: the softmax branch is not computed
            # The first call of each of the two programs compiles it.
            with contextlib.nullcontext() if is_empty in compiled else meter.paused():
                state, result = setup.train_step(state, batch, threshold)
            compiled.add(is_empty)
            step += 1
            finite.add(step, result["loss"], result["gradient_norm"])
            sent.append(result["loss"])
            jax.block_until_ready(sent[0])
            self._console.advance()

            # Most of what is due now depends on the step alone, so all processes agree on it. `stops` and the clock do
            # not: the coordination service decides `stops` for all processes, and process 0's clock counts.
            is_last = step == total_steps
            logs = is_last or step % config.logging.every_steps == 0
            evaluates = is_last or step % (config.evaluation.every_epochs * setup.steps_per_epoch) == 0
            stops = self._should_stop(step)
            saves = is_last or stops or step % config.checkpoint.every_steps == 0
            saves = saves or _is_time(config.checkpoint.every_minutes, saved_at, logs=logs)
            if not (logs or evaluates or saves):
                continue

            # Before anything is logged or saved: a run that went wrong, or lost its folder, must not write there.
            finite.check()
            self._check_lock()

            # The figures are this step's, not averages since the last line, so a resumed run writes the same figures.
            line: dict[str, Any] = {}
            scored: dict[str, Any] | None = None
            if logs:
                # `macs` counts with the softmax branch and without it.
                line |= self._log(state, result, step) | meter.read(step, macs=macs[is_empty])
                self._console.logged(step, line)
            if evaluates:
                with meter.paused():
                    figures = setup.evaluate(state.weights, threshold)
                name, score = self._measure.name, self._measure.score(figures)
                scored = {**figures, SCORE: score}
                line |= {name: figures[f"{name}_train_form"], "mask_threshold": threshold, **figures}
                self._console.evaluated(step, float(result["loss"]), result["mask_density"], figures, threshold)
                # A new best is always saved, even between the regular checkpoints.
                saves = saves or score > self._best
                self._best = max(self._best, score)
            if line and self._metrics is not None:
                self._metrics.write(step, {"epoch": step / setup.steps_per_epoch} | line)

            # After the line is written, so that a run resumed from this checkpoint has the line.
            if saves:
                saved_at = time.perf_counter()
                seconds = seconds_before + saved_at - start
                self._save(state, Progress(seconds, scored, threshold))
            if stops and not is_last:
                raise Preempted(step)
        jax.block_until_ready(state)
        seconds = seconds_before + (time.perf_counter() - start if step > first_step else 0)
        # A run that was killed after its last step resumes here without a step, and has no figures yet.
        figures = figures or setup.evaluate(state.weights, setup.threshold_at(total_steps - 1))
        return state, figures, seconds

    def _show(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Shows the first images in TensorBoard as the model will see them; all processes prepare them together."""
        images = self._setup.images_seen(state, batch, SHOWN_IMAGES)
        if self._metrics is not None and self._metrics.tensorboard is not None:
            self._metrics.tensorboard.show(images)

    def _log(self, state: TrainState, result: dict[str, jax.Array], step: int) -> dict[str, Any]:
        """The figures of a step; a skipped step, which was not finite, has no loss and no gradient norm."""
        skipped = state.skipped_steps
        line: dict[str, Any] = {
            # The optimiser's schedule counts updates, and a skipped step made none.
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
            self._metrics.flush()  # a run that resumes from this checkpoint must find all lines up to it
        self._checkpoints.save(state, progress)


def _is_time(minutes: float, since: float, *, logs: bool) -> bool:
    """Whether it is time for a checkpoint, by process 0's clock.

    The other processes ask process 0 only at logged steps, where all of them wait for the devices anyway; asking at
    every step would make them wait for each other.
    """
    is_time = time.perf_counter() - since >= 60 * minutes
    if jax.process_count() == 1:
        return is_time
    return logs and bool(multihost_utils.broadcast_one_to_all(np.int32(is_time)))
