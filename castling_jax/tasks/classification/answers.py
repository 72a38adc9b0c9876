"""What both forms of a classifier say to each image of a split, and the figures and files that come of it."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from castling_jax.plots import draw_confusion, png
from castling_jax.tasks.task import FORMS

ANSWERS_FILE = "answers.csv"
COLUMNS = ("image", "label", *FORMS)
TOP = 5  # answers among which the label counts as found, where there are more classes than that
MOST_CLASSES = 2000  # that a matrix of them is written for


@dataclasses.dataclass(frozen=True)
class ClassAnswers:
    """Both forms' answers to the images of a split, in its order; corrupt images are left out.

    Attributes:
      num_classes: how many classes the model tells apart.
      image: the number of each image in the split, from 0.
      label: the label of each image.
      train_form: the class that the training form says.
      inference_form: the class that the inference form says.
      top_train_form: whether the label is among the training form's TOP likeliest classes.
      top_inference_form: likewise.
      loss: cross entropy of the inference form in nats, without smoothing.
      difference: the largest absolute difference between the two forms' logits.
      corrupt: how many images were left out.
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
        """accuracy_FORM and, of more than TOP classes, top5_accuracy_FORM (shares) of both forms, eval_loss (the mean),
        max_difference (the largest), eval_images and eval_corrupt (counts)."""
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
        """{class: {"images": count, "accuracy": share of the inference form, None without images}}."""
        counts, shares = self.images_by_class(), self.accuracy_by_class()
        return {
            name: {"images": int(count), "accuracy": float(share) if count else None}
            for name, count, share in zip(classes, counts, shares, strict=True)
        }

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """answers.csv, confusion.csv and confusion.png.

        answers.csv has a line for each image: its number in the split from 0, its label, and the two forms' answers, as
        numbers in the order of the classes. The other two are the inference form's confusion matrix, a row for each
        class; more than MOST_CLASSES have none.
        """
        files = {ANSWERS_FILE: _csv([COLUMNS, *zip(*(getattr(self, name) for name in COLUMNS), strict=True)])}
        if len(classes) <= MOST_CLASSES:
            counts = self.confusion()
            rows = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
            files["confusion.csv"] = _csv([["label \\ answer", *classes], *rows])
            files["confusion.png"] = png(draw_confusion(counts, classes))
        return files

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Counts of images: row is the label, column the inference form's answer."""
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
    return text.getvalue().encode(errors="backslashreplace")  # a folder's name may be no UTF-8
