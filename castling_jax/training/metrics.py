"""Metrics on disk: JSON lines and TensorBoard. They are a log: what a run needs to go on stands in its checkpoints."""

import json
import time
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from castling_jax.convert.run_folder import METRICS_FILE, read_metrics
from castling_jax.storage import is_remote, write_atomically

EVENTS = "tensorboard"  # a run's folder of TensorBoard's
REMOTE_SECONDS = 60  # between two writings of a file that cannot be appended to


class MetricsWriter:
    """Appends metrics to WORKDIR/metrics.jsonl, an object a line, and to WORKDIR/tensorboard/.

    Args:
      workdir: the run's folder.
      first_step: the step that the run goes on from; what an interrupted run wrote beyond it is removed, and so are
        damaged lines.
      tensorboard: whether to write TensorBoard's events too.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, tensorboard: bool):
        self._path = workdir / METRICS_FILE
        self._lines = [json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= first_step]
        self._write_all()
        self._file = None if is_remote(workdir) else self._path.open("a")
        self._events = (
            SummaryWriter(str(workdir / EVENTS), purge_step=first_step + 1 if first_step else None)
            if tensorboard
            else None
        )

    def describe(self, texts: dict[str, str]) -> None:
        """Shows texts in TensorBoard, each under its name."""
        if self._events is None:
            return
        for name, text in texts.items():
            self._events.add_text(name, "\n".join("    " + line for line in text.splitlines()), 0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line; a list is a value for each layer."""
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written > REMOTE_SECONDS:
                self._write_all()
        if self._events is None:
            return
        for name, value in values.items():
            if isinstance(value, list):
                for layer, item in enumerate(value):
                    self._events.add_scalar(f"{name}/layer_{layer}", item, step)
            else:
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Before a checkpoint is saved: a run that goes on from it, however this one ends, has all lines up to it."""
        if self._file is None:
            self._write_all()
        if self._events is not None:
            self._events.flush()

    def _write_all(self) -> None:
        write_atomically(self._path, "".join(self._lines).encode())
        self._written = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is None:
            self._write_all()
        else:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_history(workdir: epath.Path) -> dict[str, np.ndarray]:
    """The metrics as arrays: "step" [lines], and each figure [lines] or [lines, layers], NaN where a line lacks it."""
    lines = read_metrics(workdir)
    history = {"step": np.array([line["step"] for line in lines], np.int64)}
    for name in dict.fromkeys(name for line in lines for name in line if name != "step"):
        values = [np.array(line.get(name, np.nan), np.float64) for line in lines]
        shape = np.broadcast_shapes(*{value.shape for value in values})
        history[name] = np.stack([np.broadcast_to(value, shape) for value in values])
    return history
