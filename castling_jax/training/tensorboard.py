"""TensorBoard's events: figures in groups, the configuration with the final figures, and the first images."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from castling_jax.models.variables import flatten

EVENTS = "tensorboard"  # a run's folder of TensorBoard's
TRAIN = ("epoch", "loss", "learning_rate", "gradient_norm", "mask_threshold", "mask_density", "skipped_steps")
THROUGHPUT = ("images_per_second", "images_per_second_per_chip", "mfu", "data_wait_share", "eta_seconds")
GROUPS = dict.fromkeys(TRAIN, "train") | dict.fromkeys(THROUGHPUT, "throughput")  # all others: eval


class TensorBoard:
    """Writes WORKDIR/tensorboard/.

    Args:
      workdir: the run's folder.
      first_step: the step that the run goes on from; TensorBoard hides what an interrupted run wrote beyond it.
      exported: the weights that the run exports, "raw" or "averaged". Figures without such a prefix are theirs.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, exported: str):
        self._exported = exported
        self._events = SummaryWriter(str(workdir / EVENTS), purge_step=first_step + 1 if first_step else 0)

    def describe(self, texts: Mapping[str, str]) -> None:
        """Shows texts, each under its name."""
        for name, text in texts.items():
            self._events.add_text(name, "\n".join("    " + line for line in text.splitlines()), 0)

    def show(self, images: UInt8[np.ndarray, "images height width 3"]) -> None:
        """Shows the first images to learn from, in one picture."""
        self._events.add_images("train/first_batch", images, 0, dataformats="NHWC")

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes the figures of a step, once each; a list is a value for each layer."""
        for tag, value in self._tagged(figures).items():
            if isinstance(value, list):
                for layer, item in enumerate(value):
                    self._events.add_scalar(f"{tag}/layer_{layer}", item, step)
            else:
                self._events.add_scalar(tag, value, step)

    def finish(self, step: int, config: dict[str, Any], evaluated: Mapping[str, float], *, group: str) -> None:
        """Writes what the page HPARAMS compares runs by: the configuration's fields with the final figures.

        Args:
          step: the last one.
          config: nested dicts; a field that is None is left blank there.
          evaluated: the figures of the last evaluation.
          group: "eval" where the figures of that evaluation have been written; "test" where they are of the test split.
        """
        tagged = self._tagged(evaluated, group)
        if group != "eval":
            for tag, value in tagged.items():
                self._events.add_scalar(tag, value, step)
        fields = {
            path.replace("/", "."): value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for path, value in flatten(config).items()
            if value is not None
        }
        # Not add_hparams, which would start a folder that TensorBoard takes for another run.
        for summary in hparams(fields, tagged):
            self._events.file_writer.add_summary(summary)

    def _tagged(self, figures: Mapping[str, Any], group: str = "eval") -> dict[str, Any]:
        """The figures by their names in TensorBoard, such as train/loss, and eval/loss for eval_loss.

        Doubles are left out: a measure without a form, as `accuracy`, and the exported weights' figures under their
        prefix.
        """
        return {
            f"{GROUPS.get(name, group)}/{name.replace('eval_', '')}": value
            for name, value in figures.items()
            if f"{name}_train_form" not in figures and not name.startswith(f"{self._exported}_")
        }

    def flush(self) -> None:
        """Writes what is still in memory."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._events.close()
