"""Both forms' confusion matrices of the images of a split, and the figures and files made from them."""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from castling_jax.data.decode import decode
from castling_jax.data.masks import read_labels
from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError, check
from castling_jax.tasks.task import FORMS

DRAWN = 8  # images in a picture
MOST_CLASSES = 200  # a confusion matrix of more classes is not drawn


@dataclasses.dataclass(frozen=True)
class MaskAnswers:
    """Both forms' answers to the images of a split, in its order; corrupt images are left out.

    Attributes:
      dataset: the split, with the true masks.
      image: number of each image in the split, from 0.
      train_form: number of pixels of each image by class (row) and the training form's answer (column), at the image's
        own size; pixels without a class are left out.
      inference_form: the same for the inference form.
      loss: sum of the inference form's cross entropies over these pixels, in nats.
      difference: largest difference between the two forms' logits for each image, as `largest_difference` computes it.
      thumbnail: each image's answers of the inference form, in fewer pixels.
      corrupt: number of corrupt images, which were left out.
      exif: whether images are turned as their EXIF orientation says.
    """

    dataset: Dataset
    image: Int[np.ndarray, "images"]
    train_form: Int[np.ndarray, "images classes classes"]
    inference_form: Int[np.ndarray, "images classes classes"]
    loss: Float[np.ndarray, "images"]
    difference: Float[np.ndarray, "images"]
    thumbnail: UInt8[np.ndarray, "images rows columns"]
    corrupt: int
    exif: bool

    def figures(self) -> dict[str, float]:
        """mIoU_FORM and pixel_accuracy_FORM of both forms (shares); eval_loss (mean over the pixels that have a class);
        max_difference (largest); eval_images and eval_corrupt (counts).

        mIoU is the mean of the classes' IoUs over the whole split, without classes that neither the masks nor the
        answers have.

        Raises:
          InputError: no pixel has a class.
        """
        counts = {form: self.confusion(form) for form in FORMS}
        pixels = int(counts["inference_form"].sum())
        check(pixels, f"none of the {len(self.image):,} images evaluated has a pixel with a class.")
        shares = {f"mIoU_{form}": float(np.nanmean(ious(count))) for form, count in counts.items()}
        shares |= {f"pixel_accuracy_{form}": float(np.trace(count) / pixels) for form, count in counts.items()}
        return shares | {
            "eval_loss": float(np.sum(self.loss, dtype=np.float64) / pixels),
            "max_difference": float(np.max(self.difference)),
            "eval_images": len(self.image),
            "eval_corrupt": self.corrupt,
        }

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{class: {"images": images with such a pixel, "pixels": pixels, "mIoU": the inference form's IoU of the class,
        or None without a pixel in masks and answers}}."""
        by_image = self.inference_form.sum(2, dtype=np.int64)
        shares = ious(self.confusion("inference_form"))
        return {
            name: {"images": int(images), "pixels": int(pixels), "mIoU": None if np.isnan(share) else float(share)}
            for name, images, pixels, share in zip(classes, (by_image > 0).sum(0), by_image.sum(0), shares, strict=True)
        }

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """classes.csv, confusion.png and segmentation.png, all of the inference form.

        classes.csv has each class's IoU, and the share of its pixels that were found. segmentation.png shows the
        split's first images with their true masks and with the answers. The confusion matrix is not drawn for more than
        MOST_CLASSES classes.
        """
        from castling_jax.plots import (  # here, because matplotlib takes half a second to import
            draw_confusion,
            draw_segmentation,
            png,
        )

        counts = self.confusion("inference_form")
        found = np.diag(counts) / np.maximum(counts.sum(1), 1)
        rows = [
            [name, *row.values(), float(share) if row["pixels"] else None]
            for (name, row), share in zip(self.by_class(classes).items(), found, strict=True)
        ]
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([["class", "images", "pixels", "IoU", "accuracy"], *rows])
        files = {"classes.csv": table.getvalue().encode(errors="backslashreplace")}
        if len(classes) <= MOST_CLASSES:
            files["confusion.png"] = png(draw_confusion(counts, classes, unit="pixels"))
        pictures = list(self._pictures())
        return files | ({"segmentation.png": png(draw_segmentation(pictures, classes))} if pictures else {})

    def confusion(self, form: str) -> Int[np.ndarray, "classes classes"]:
        """Number of pixels in the split by class (row) and the form's answer (column)."""
        return getattr(self, form).sum(0, dtype=np.int64)

    def _pictures(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (image, true mask, answered mask in fewer pixels) of the split's first images."""
        for index, answer in zip(self.image[:DRAWN], self.thumbnail, strict=False):
            with contextlib.suppress(InputError):
                example = self.dataset[int(index)]
                image = np.asarray(decode(example["image"], exif=self.exif))
                yield image, read_labels(example, image.shape[:2]), answer


def ious(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes"]:
    """Each class's intersection over union; NaN for a class that is neither in the rows nor in the columns."""
    both = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
