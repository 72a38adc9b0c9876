"""Traces a few steps for XProf."""

import tempfile
from types import TracebackType
from typing import Self

import jax
import jax.profiler
from etils import epath

from castling_jax.storage import copy_folder, is_remote

PROFILE = "profile"  # the folder of traces in a run's folder


class Profiler:
    """Traces the steps of `profile` into WORKDIR/profile; None traces nothing."""

    def __init__(self, profile: range | None, workdir: epath.Path):
        self._steps = profile
        self._folder = workdir / PROFILE
        # The profiler would write to a bucket by itself with other credentials, so it writes here and we copy.
        is_copied = profile is not None and is_remote(self._folder)
        self._written = epath.Path(tempfile.mkdtemp()) if is_copied else self._folder
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()

    def before(self, step: int, state: object) -> None:
        """Starts or stops the trace before a step, once the devices have finished the steps before it."""
        wanted = self._steps is not None and step in self._steps
        if wanted == self._running:
            return
        # Steps are sent ahead: without waiting, the trace would begin inside an earlier step.
        jax.block_until_ready(state)
        if wanted:
            jax.profiler.start_trace(self._written)
            self._running = True
        else:
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        if self._written != self._folder:
            copy_folder(self._written, self._folder)
            self._written.rmtree()
