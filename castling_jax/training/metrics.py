"""Metrics on disk: JSON lines and TensorBoard."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from castling_jax.convert.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics to WORKDIR/metrics.jsonl, an object a line, and to WORKDIR/tensorboard/.

    Args:
      workdir: the run's folder.
      first_step: the step that the run goes on from; what an interrupted run wrote beyond it is removed.
      tensorboard: whether to write TensorBoard's events too.
    """

    def __init__(self, workdir: Path, *, first_step: int, tensorboard: bool):
        path = workdir / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        self._events = (
            SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
            if tensorboard
            else None
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line; a list is a value for each layer."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is None:
            return
        for name, value in values.items():
            if isinstance(value, list):
                for layer, item in enumerate(value):
                    self._events.add_scalar(f"{name}/layer_{layer}", item, step)
            else:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of WORKDIR/metrics.jsonl; none where there is no such file. A last line cut short is left out."""
    path = workdir / METRICS_FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the run was killed while writing it
    return lines
