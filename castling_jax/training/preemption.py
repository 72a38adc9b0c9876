"""SIGTERM, by which a cluster takes a machine away: the run saves at one step, on all hosts the same, and ends."""

import signal
import threading
from types import TracebackType
from typing import Self

import jax

from castling_jax.training.checkpoints import Checkpoints


class Preempted(Exception):  # noqa: N818  it is no error: the run has saved what it did
    """The run was told to end, and has saved its state; `step` is where."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class PreemptionWatch:
    """While it is entered, SIGTERM does not kill.

    Several processes agree on a step through JAX's coordination service, which then has the signal's handler. A
    process alone has its own.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._told = False

    def __enter__(self) -> Self:
        # Only the main thread may have handlers; elsewhere, as in some notebooks, SIGTERM kills as it always does.
        alone = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
        self._previous = signal.signal(signal.SIGTERM, self._hear) if alone else None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _hear(self, *_: object) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether this is the step to save at, and to end."""
        return self._told or self._checkpoints.reached_preemption(step)
