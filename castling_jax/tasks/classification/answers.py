"""Both forms' answers to each image of a split, and the figures and files made from them."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from castling_jax.tasks.task import FORMS

ANSWERS_FILE = "answers.csv"
COLUMNS = ("image", "label", *FORMS)
TOP = 5  # top-5 accuracy, for models with more classes than that
MOST_CLASSES = 2000  # a confusion matrix of more classes is not written


@dataclasses.dataclass(frozen=True)
class ClassAnswers:
    """Both forms' answers to the images of a split, in its order; corrupt images are left out.

    Attributes:
      num_classes: number of the model's classes.
      image: number of each image in the split, from 0.
      label: label of each image.
      train_form: class that the training form answers.
      inference_form: class that the inference form answers.
      top_train_form: whether the label is among the training form's TOP likeliest classes.
      top_inference_form: whether the label is among the inference form's TOP likeliest classes.
      loss: cross entropy of the inference form in nats, without smoothing.
      difference: largest absolute difference between the two forms' logits.
      corrupt: number of corrupt images, which were left out.
    """

    num_classes: int
    image: Int[np.ndarray, "images"]
    label: Int[np.ndarray, "images"]
    train_form: Int[np.ndarray, "images"]
    inference_form: Int[np.ndarray, "images"]
    top_train_form: Bool[np.ndarray, "images"]
    top_inference_form: Bool[np.ndarray, "images"]
    loss: Float[np.ndarray, "images"]
    difference: Float[np.ndarray, "images"]
    corrupt: int

    def figures(self) -> dict[str, float]:
        """accuracy_FORM and, with more than TOP classes, top5_accuracy_FORM of both forms (shares); eval_loss (mean);
        max_difference (largest); eval_images and eval_corrupt (counts)."""
        shares = {f"accuracy_{form}": float(np.mean(getattr(self, form) == self.label)) for form in FORMS}
        if self.num_classes > TOP:
            shares |= {f"top{TOP}_accuracy_{form}": float(np.mean(getattr(self, f"top_{form}"))) for form in FORMS}
        return shares | {
            "eval_loss": float(np.mean(self.loss, dtype=np.float64)),
            "max_difference": float(np.max(self.difference)),
            "eval_images": len(self.label),
            "eval_corrupt": self.corrupt,
        }

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{class: {"images": count, "accuracy": the inference form's share, or None for a class without images}}."""
        counts, shares = self.images_by_class(), self.accuracy_by_class()
        return {
            name: {"images": int(count), "accuracy": float(share) if count else None}
            for name, count, share in zip(classes, counts, shares, strict=True)
        }

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """answers.csv, confusion.csv and confusion.png.

        answers.csv has a line for each image: its number in the split from 0, its label, and the two forms' answers.
        Labels and answers are the classes' numbers. The other two files are the inference form's confusion matrix, with
        a row for each label; they are not written for more than MOST_CLASSES classes.
        """
        files = {ANSWERS_FILE: _csv([COLUMNS, *zip(*(getattr(self, name) for name in COLUMNS), strict=True)])}
        if len(classes) <= MOST_CLASSES:
            from castling_jax.plots import draw_confusion, png  # here, because matplotlib takes half a second to import

            counts = self.confusion()
            rows = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
            files["confusion.csv"] = _csv([["label \\ answer", *classes], *rows])
            files["confusion.png"] = png(draw_confusion(counts, classes))
        return files

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Number of images by label (row) and the inference form's answer (column)."""
        # Each pair (label, answer) becomes one number, so that bincount counts pairs; 64 bits hold classes squared.
        pairs = self.label.astype(np.int64) * self.num_classes + self.inference_form
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, -1)

    def images_by_class(self) -> Int[np.ndarray, "classes"]:
        """How many images each class has."""
        return np.bincount(self.label, minlength=self.num_classes)

    def accuracy_by_class(self) -> Float[np.ndarray, "classes"]:
        """The inference form's share of right answers for each class; NaN for a class without images."""
        right = np.bincount(self.label[self.inference_form == self.label], minlength=self.num_classes)
        images = self.images_by_class()
        return np.divide(right, images, out=np.full(self.num_classes, np.nan), where=images > 0)


def _csv(rows: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # a class is a folder's name, which may not be UTF-8
