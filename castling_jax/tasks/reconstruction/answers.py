"""How well both forms reconstruct the images of a split."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from castling_jax.tasks.task import FORMS


@dataclasses.dataclass(frozen=True)
class ReconstructionAnswers:
    """Both forms' losses on the images of a split, in its order; corrupt images are left out.

    Attributes:
      image: number of each image in the split, from 0.
      train_form: the training form's loss on each image.
      inference_form: the inference form's loss on each image.
      difference: largest difference between the two forms' outputs for each image, as `largest_difference` computes it.
      corrupt: number of corrupt images, which were left out.
    """

    image: Int[np.ndarray, "images"]
    train_form: Float[np.ndarray, "images"]
    inference_form: Float[np.ndarray, "images"]
    difference: Float[np.ndarray, "images"]
    corrupt: int

    def figures(self) -> dict[str, float]:
        """reconstruction_loss_FORM of both forms (means); max_difference (largest); eval_images and eval_corrupt."""
        means = {form: float(np.mean(getattr(self, form), dtype=np.float64)) for form in FORMS}
        return {f"reconstruction_loss_{form}": mean for form, mean in means.items()} | {
            "max_difference": float(np.max(self.difference)),
            "eval_images": len(self.image),
            "eval_corrupt": self.corrupt,
        }

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{}: nothing is measured class by class."""
        return {}

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """losses.csv, with a line for each image: its number in the split from 0, and both forms' losses."""
        text = io.StringIO()
        rows = zip(self.image.tolist(), self.train_form.tolist(), self.inference_form.tolist(), strict=True)
        csv.writer(text, lineterminator="\n").writerows([("image", *FORMS), *rows])
        return {"losses.csv": text.getvalue().encode()}
