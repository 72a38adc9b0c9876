"""What becomes of a run when a step's loss or gradients are not finite."""

import math
from collections.abc import Callable

import jax
from etils import epath

from castling_jax.errors import DeterministicError
from castling_jax.training.checkpoints import next_start

OTHER_START = "a smaller config.optimizer.learning_rate or a config.optimizer.clip_norm, in another --workdir"


class FiniteCheck:
    """Looks at each step's loss and gradient norm, some steps later, so that no step is waited for.

    Args:
      on_nonfinite: "stop", or "skip" where the training step leaves such a step out (`make_train_step`).
      max_skips: this many skipped steps in a row stop the run too.
      checkpoints: the run's folder of them, of which the errors tell.
      say: is given a sentence about each step that was skipped.
    """

    def __init__(self, on_nonfinite: str, max_skips: int, checkpoints: epath.Path, say: Callable[[str], None]):
        self._stops, self._max_skips = on_nonfinite == "stop", max_skips
        self._checkpoints, self._say = checkpoints, say
        self._unchecked: list[tuple[int, jax.Array, jax.Array]] = []
        self._in_a_row = 0

    def add(self, step: int, loss: jax.Array, gradient_norm: jax.Array) -> None:
        """Notes the results of a step, which need not be computed yet."""
        self._unchecked.append((step, loss, gradient_norm))

    def check(self) -> None:
        """Looks at all steps since the last call, and waits for them.

        Raises:
          DeterministicError: names the first step that is not finite or, where those are skipped, that `max_skips` were
            skipped in a row.
        """
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
