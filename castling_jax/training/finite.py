"""Stops a run, or reports a skipped step, when a step's loss or gradients are not finite."""

import math
from collections.abc import Callable

import jax
from etils import epath

from castling_jax.errors import DeterministicError
from castling_jax.training.checkpoints import next_start

OTHER_START = "a smaller config.optimizer.learning_rate or a config.optimizer.clip_norm, in another --workdir"


class FiniteCheck:
    """Checks each step's loss and gradient norm a few steps later, so that the loop does not wait for every step.

    Args:
      on_nonfinite: "stop"; or "skip", if the training step skips such steps (`make_train_step`).
      max_skips: number of skipped steps in a row that stops the run.
      checkpoints: the folder of the run's checkpoints; the errors say where the run would resume.
      say: called with a sentence about each skipped step.
    """

    def __init__(self, on_nonfinite: str, max_skips: int, checkpoints: epath.Path, say: Callable[[str], None]):
        self._stops, self._max_skips = on_nonfinite == "stop", max_skips
        self._checkpoints, self._say = checkpoints, say
        self._unchecked: list[tuple[int, jax.Array, jax.Array]] = []
        self._in_a_row = 0

    def add(self, step: int, loss: jax.Array, gradient_norm: jax.Array) -> None:
        """Keeps the results of a step for the next check; they need not be computed yet."""
        self._unchecked.append((step, loss, gradient_norm))

    def check(self) -> None:
        """Waits for all steps since the last call, and checks them.

        Raises:
          DeterministicError: a step is not finite (the message names the first); or, with "skip", `max_skips` steps in
            a row were skipped.
        """
        # One transfer for all of them.
        results, self._unchecked = jax.device_get(self._unchecked), []
        for step, loss, norm in results:
            if math.isfinite(loss) and math.isfinite(norm):
                self._in_a_row = 0
                continue
            what = f"the gradients' norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            if self._stops:
                raise DeterministicError(
                    f"{what} at step {step}: {next_start(self._checkpoints)}, and leaves such steps out with "
                    f"--config.train.on_nonfinite=skip; or try {OTHER_START}."
                )
            self._in_a_row += 1
            if self._in_a_row == self._max_skips:
                raise DeterministicError(
                    f"{what} at step {step}, the last of {self._max_skips} in a row that were skipped for this "
                    f"(config.train.max_skips): try {OTHER_START}."
                )
            self._say(f"Skipped step {step}: {what} (in a row: {self._in_a_row}; {self._max_skips} stop the run).")
