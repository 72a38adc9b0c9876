"""Writes TensorBoard's events: figures in groups, the configuration with the final figures, and the first images."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from castling_jax.errors import printable
from castling_jax.models.variables import flatten

EVENTS = "tensorboard"  # the folder of TensorBoard's events in a run's folder
TRAIN = ("epoch", "loss", "learning_rate", "gradient_norm", "mask_threshold", "mask_density", "skipped_steps")
THROUGHPUT = ("images_per_second", "images_per_second_per_chip", "mfu", "data_wait_share", "eta_seconds")
GROUPS = dict.fromkeys(TRAIN, "train") | dict.fromkeys(THROUGHPUT, "throughput")  # all other figures: eval


class TensorBoard:
    """Writes WORKDIR/tensorboard/.

    Args:
      workdir: the run's folder.
      first_step: the step that the run resumes from; TensorBoard hides events that an interrupted run wrote beyond it.
      exported: the weights that the run exports, "raw" or "averaged". Figures without such a prefix belong to them.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, exported: str):
        from tensorboardX import SummaryWriter  # here, because it imports Google's storage library where installed

        self._exported = exported
        self._events = SummaryWriter(str(workdir / EVENTS), purge_step=first_step + 1 if first_step else 0)

    def describe(self, texts: Mapping[str, str]) -> None:
        """Shows texts, each under its name."""
        for name, text in texts.items():
            # Indented by four: TensorBoard renders Markdown, where that is a block of code.
            self._events.add_text(name, "\n".join("    " + line for line in text.splitlines()), 0)

    def show(self, images: UInt8[np.ndarray, "images height width 3"]) -> None:
        """Shows the first training images in one picture."""
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
        """Writes the configuration's fields with the final figures, by which the page HPARAMS compares runs.

        Args:
          step: the last step.
          config: the configuration as nested dicts; a field that is None stays blank on the page.
          evaluated: the figures of the last evaluation.
          group: "eval" if these figures are written already; "test" if they belong to the test split.
        """
        from tensorboardX.summary import hparams

        tagged = self._tagged(evaluated, group)
        if group != "eval":
            for tag, value in tagged.items():
                self._events.add_scalar(tag, value, step)
        fields = {
            path.replace("/", "."): value if isinstance(value, bool | int | float) else _text(value)
            for path, value in flatten(config).items()
            if value is not None
        }
        # Not add_hparams, which would create another folder, and TensorBoard would show it as another run.
        for summary in hparams(fields, tagged):
            self._events.file_writer.add_summary(summary)

    def _tagged(self, figures: Mapping[str, Any], group: str = "eval") -> dict[str, Any]:
        """Name in TensorBoard, such as train/loss, or eval/loss for eval_loss -> figure.

        Duplicates are left out: a measure without a form, such as `accuracy`, and figures with the prefix of the
        exported weights.
        """
        return {
            f"{GROUPS.get(name, group)}/{name.replace('eval_', '')}": value
            for name, value in figures.items()
            if f"{name}_train_form" not in figures and not name.startswith(f"{self._exported}_")
        }

    def flush(self) -> None:
        """Writes the events that are still in memory."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._events.close()


def _text(value: Any) -> str:
    """A field's value as a string: protocol buffers refuse a path that is not UTF-8."""
    return printable(value) if isinstance(value, str) else json.dumps(value)
