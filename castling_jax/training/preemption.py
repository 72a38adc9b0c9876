"""SIGTERM, by which a cluster takes a machine away, and Ctrl-C: the run saves at one step, the same on all hosts."""

import os
import signal
import threading
from types import TracebackType
from typing import Any, Self

import jax

from castling_jax.training.checkpoints import Checkpoints

INTERRUPTED = b"\nInterrupted: the run saves after this step and ends. A second Ctrl-C ends it at once.\n"


class Preempted(Exception):  # noqa: N818  it is no error: the run has saved what it did
    """The run was told to end, by SIGTERM or Ctrl-C, and has saved its state; `step` is where."""

    def __init__(self, step: int):
        super().__init__(f"the state of step {step} is saved, and the same call goes on from there.")
        self.step = step


class PreemptionWatch:
    """While it is entered, SIGTERM and the first Ctrl-C (SIGINT), even inherited as ignored, have the run save.

    A second Ctrl-C does what one did before: in a script or a notebook's cell it raises KeyboardInterrupt.

    Several processes agree on a step through JAX's coordination service, which then has SIGTERM's handler; a process
    that is interrupted tells the service of it by a SIGTERM to itself, so it is enough to interrupt any one of them.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._told = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._alone = not jax.distributed.is_initialized()
        self._speaks = jax.process_index() == 0
        # Only the main thread may have handlers; elsewhere, as in some notebooks, both signals do what they always do.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if self._alone:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: not Python's own, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, *_: object) -> None:
        self._told = True

    def _interrupt(self, *_: object) -> None:
        before = self._previous.get(signal.SIGINT)
        signal.signal(signal.SIGINT, before if callable(before) else signal.default_int_handler)
        if self._speaks:
            os.write(2, INTERRUPTED)  # print could be interrupted in the middle of another print
        if self._alone:
            self._told = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether this is the step to save at, and to end."""
        return self._told or self._checkpoints.reached_preemption(step)
