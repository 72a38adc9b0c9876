"""Logs a run's figures: as JSON lines on disk, in TensorBoard, and to callbacks.

It is only a log: a run resumes from its checkpoints alone.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from castling_jax.convert.run_folder import METRICS_FILE, read_metrics
from castling_jax.errors import InputError
from castling_jax.storage import is_remote, write_atomically
from castling_jax.training.tensorboard import TensorBoard

REMOTE_SECONDS = 60  # between two uploads of the whole log, because a bucket's file cannot be appended to

Callback = Callable[[int, dict[str, Any]], object]


def check_callbacks(callbacks: object) -> None:
    """Raises an InputError unless `callbacks` is a list or a tuple of callables."""
    if not isinstance(callbacks, list | tuple) or not all(map(callable, callbacks)):
        raise InputError(f"callbacks must be a list of functions of (step, figures), not {callbacks!r}.")


class MetricsWriter:
    """Appends figures to WORKDIR/metrics.jsonl, an object a line, and passes them on to TensorBoard and callbacks.

    Args:
      workdir: the run's folder.
      first_step: the step that the run starts from. Lines that an interrupted run wrote beyond it, and damaged lines,
        are removed.
      tensorboard: TensorBoard's writer; None for none.
      callbacks: functions of (step, figures), called with each line once it is written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        first_step: int,
        tensorboard: TensorBoard | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self._path = workdir / METRICS_FILE
        self._lines = [json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= first_step]
        self._write_all()
        self._file = None if is_remote(workdir) else self._path.open("a")
        self.tensorboard, self._callbacks = tensorboard, callbacks

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line; a list is a value for each layer."""
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()  # to the system, so that the line survives the process
        else:
            self._lines.append(line)
            if time.monotonic() - self._written > REMOTE_SECONDS:
                self._write_all()
        if self.tensorboard is not None:
            self.tensorboard.write(step, values)
        for callback in self._callbacks:
            callback(step, dict(values))  # a copy, because a callback may change it

    def flush(self) -> None:
        """Writes all lines so far; called before a checkpoint, so that a run resumed from it has all lines up to it."""
        if self._file is None:
            self._write_all()
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def _write_all(self) -> None:
        write_atomically(self._path, "".join(self._lines).encode())
        self._written = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is None:
            self._write_all()
        else:
            self._file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_history(workdir: epath.Path) -> dict[str, np.ndarray]:
    """The log as arrays: "step" [lines], and each figure [lines] or [lines, layers] with NaN for lines that lack it."""
    lines = read_metrics(workdir)
    history = {"step": np.array([line["step"] for line in lines], np.int64)}
    for name in dict.fromkeys(name for line in lines for name in line if name != "step"):
        values = [np.array(line.get(name, np.nan), np.float64) for line in lines]
        shape = np.broadcast_shapes(*{value.shape for value in values})
        history[name] = np.stack([np.broadcast_to(value, shape) for value in values])
    return history
