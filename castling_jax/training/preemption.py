"""Makes a run save and end after SIGTERM, which a cluster sends before it takes a machine away, and after Ctrl-C."""

import os
import signal
import threading
from types import TracebackType
from typing import Any, Self

import jax

from castling_jax.training.checkpoints import Checkpoints

INTERRUPTED = b"\nInterrupted: the run saves after this step and ends. A second Ctrl-C ends it at once.\n"


class Preempted(Exception):  # noqa: N818  not an error: the run has saved its work
    """The run was told to end, by SIGTERM or Ctrl-C, and has saved the state of `step`."""

    def __init__(self, step: int):
        super().__init__(f"the state of step {step} is saved, and the same call goes on from there.")
        self.step = step


class PreemptionWatch:
    """Inside its `with` block, SIGTERM and the first Ctrl-C (SIGINT) make the run save, even if inherited as ignored.

    A second Ctrl-C does what Ctrl-C did before: in a script or a notebook's cell it raises KeyboardInterrupt.

    Several processes agree on a step through JAX's coordination service, which then handles SIGTERM. An interrupted
    process sends itself a SIGTERM to tell the service, so it is enough to interrupt any one of them.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._must_end = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._alone = not jax.distributed.is_initialized()
        self._speaks = jax.process_index() == 0
        # Python allows only the main thread to set handlers. In other threads, as in some notebooks, both signals do
        # what they always do.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if self._alone:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, and that Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, *_: object) -> None:
        self._must_end = True

    def _interrupt(self, *_: object) -> None:
        # First, so that a second Ctrl-C takes effect even while this handler runs.
        before = self._previous.get(signal.SIGINT)
        signal.signal(signal.SIGINT, before if callable(before) else signal.default_int_handler)
        if self._speaks:
            os.write(2, INTERRUPTED)  # not print, which the signal may have interrupted and which is not reentrant
        if self._alone:
            self._must_end = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether the run must save after this step and end."""
        return self._must_end or self._checkpoints.reached_preemption(step)
