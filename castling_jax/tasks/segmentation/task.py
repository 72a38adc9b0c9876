"""Segmentation as a task: pixels with and without a class, cross entropy and dice, and mIoU at the images' own size."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from castling_jax.convert.inference import largest_difference
from castling_jax.data.masks import IGNORED, INVALID, MaskedImages, decode_mask, has_labels, sizes_of
from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError, check
from castling_jax.models.model import Model
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize, image_shape
from castling_jax.tasks.segmentation.answers import MaskAnswers
from castling_jax.tasks.segmentation.losses import pixel_cross_entropy, soft_dice_loss
from castling_jax.tasks.segmentation.predictions import MaskPredictions
from castling_jax.tasks.segmentation.transforms import EvalTransform, train_transform
from castling_jax.tasks.segmentation.windows import join, windows_of
from castling_jax.tasks.task import (
    FORMS,
    Batch,
    Example,
    Loss,
    Measure,
    Task,
    Teacher,
    check_crop,
    check_no_teacher,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP = 64  # rows of an image that an evaluation holds at a time
THUMBNAIL = 256  # pixels along a side of a thumbnail of an answer
Outputs = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Segmentation(Task):
    """Batches are {"image", "mask" [batch, height, width]}, where a mask has a class or IGNORED for each pixel.

    The host also sends "filled" [batch, 2], the size of the part of the result that the image fills.

    Attributes:
      num_classes: number of classes.
      dice: weight of the dice loss, beside the cross entropy's weight of 1.
      exif: whether images are turned as their EXIF orientation says.
    """

    name = "segmentation"
    measures = (
        Measure("mIoU", "held-out mIoU", "mIoU"),
        Measure("pixel_accuracy", "  right pixels", "right pixels"),
    )
    fields = (
        *("augment.scale_range", "augment.flip", "augment.distort", "augment.repeats"),
        *("loss.dice", "dataset.ignore_label", "dataset.first_label"),
    )
    annotation = "mask"
    loss_title = "cross entropy of a pixel (nats)"
    predictions = MaskPredictions

    num_classes: int
    dice: float
    exif: bool

    @classmethod
    def from_config(
        cls, config: ConfigDict, model: Model, teacher: Teacher | None = None, *, steps_per_epoch: int = 1
    ) -> "Segmentation":
        check_no_teacher(teacher, "a segmenter")
        data = config.dataset
        check_crop(data, ("squash", "slide"), "a segmenter")
        return cls(model.spec.num_classes, config.loss.dice, data.exif)

    @classmethod
    def check_annotated(cls, dataset: Dataset) -> None:
        if dataset.num_classes < 2:
            raise InputError(
                f"a segmenter tells at least two classes apart, and the data set has {dataset.num_classes}: a pixel's "
                "class is 0, 1, 2 and so on, and config.dataset.ignore_label is no class."
            )
        masks = cast(MaskedImages, dataset)
        check(has_labels(masks), f"none of the {len(masks):,} masks has a pixel with a class: choose another split.")

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        return train_transform(augment, preprocessing)

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        return EvalTransform(preprocessing)

    @classmethod
    def split_transform(cls, preprocessing: Preprocessing, dataset: Dataset) -> Callable[[Example], Example]:
        sizes = sizes_of(cast(MaskedImages, dataset)) or [(1, 1)]
        heights, widths = zip(*sizes, strict=True)
        most = max(len(windows_of(size, preprocessing)) for size in set(sizes))
        return EvalTransform(preprocessing, (max(heights), max(widths)), most)

    def example_shapes(self, image_size: ImageSize) -> dict[str, jax.ShapeDtypeStruct]:
        size = image_shape(image_size)
        return {
            "image": jax.ShapeDtypeStruct((*size, 3), jnp.uint8),
            "filled": jax.ShapeDtypeStruct((2,), jnp.int32),
            "mask": jax.ShapeDtypeStruct(size, jnp.uint8),
        }

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        return batch

    def caption(self, example: Example, classes: Sequence[str]) -> str:
        mask = example["mask"]
        labels = example["table"][decode_mask(mask)] if isinstance(mask, bytes) else np.asarray(mask)
        count = len(np.unique(labels[labels < INVALID]))
        return f"{count} class" + "es" * (count != 1)

    def draw(self, axis: "Axes", example: Example, classes: Sequence[str]) -> None:
        if "mask" in example:  # a transformed example; evaluation's has no mask
            from castling_jax.plots import color_labels  # here, because matplotlib takes half a second to import

            axis.imshow(color_labels(np.asarray(example["mask"])))

    def loss(self, outputs: Outputs, batch: Batch, held: Any) -> Loss:
        labels = batch["mask"].astype(jnp.int32)
        total, weight = pixel_cross_entropy(outputs["logits"], labels)
        if not self.dice:
            return {"cross_entropy": total}, weight
        # An image's dice weighs as much as its pixels that have a class, so that one division serves both terms.
        return {"cross_entropy": total, "dice": self.dice * weight * soft_dice_loss(outputs["logits"], labels)}, weight

    def answer(
        self, outputs: Mapping[str, Outputs], exact: Mapping[str, Outputs], batch: Batch
    ) -> dict[str, jax.Array]:
        windows = batch["windows"]

        def by_image(x: Array) -> Array:
            return x.reshape(*windows.shape[:2], *x.shape[1:])

        answers: dict[str, jax.Array] = {}
        for form in FORMS:
            answers[form], answers["loss"] = self._counts(by_image(outputs[form]["logits"]), windows, batch["mask"])
        # The loss is the inference form's, which comes last.
        answers["thumbnail"] = self._thumbnail(by_image(outputs["inference_form"]["logits"]), windows, batch["size"])
        both = (jax.tree.map(by_image, exact[form]) for form in FORMS)
        answers["difference"] = jax.vmap(lambda one, other: largest_difference(one, other, 1))(*both)
        return answers

    def collect(self, answers: dict[str, np.ndarray], dataset: Dataset, corrupt: int) -> MaskAnswers:
        return MaskAnswers(dataset, **answers, corrupt=corrupt, exif=self.exif)

    def _counts(self, logits: Array, windows: Array, masks: Array) -> tuple[Array, Array]:
        """(confusion matrix, sum of the cross entropies) of each image at its own size.

        Computed in strips of STRIP rows: whole, 150 classes of an image of 2,000 x 1,500 pixels take 1.8 GB.
        """
        rows = -masks.shape[1] % STRIP
        padded = jnp.pad(masks, ((0, 0), (0, rows), (0, 0)), constant_values=IGNORED).astype(jnp.int32)
        strips = jnp.moveaxis(padded.reshape(len(masks), -1, STRIP, masks.shape[2]), 1, 0)

        def add(total: Any, strip: tuple[Array, Array]) -> tuple[Any, None]:
            top, labels = strip
            seen = join(logits, windows.at[..., 0].add(-top), labels.shape[1:])
            matrices = jax.vmap(confusion_matrix, (0, 0, None))(labels, seen.argmax(-1), self.num_classes)
            losses, _ = pixel_cross_entropy(seen, labels)
            return (total[0] + matrices, total[1] + losses), None

        count = self.num_classes
        zeros = jnp.zeros((len(masks), count, count), jnp.int32), jnp.zeros(len(masks))
        total, _ = jax.lax.scan(add, zeros, (STRIP * jnp.arange(len(strips), dtype=jnp.float32), strips))
        return total

    @staticmethod
    def _thumbnail(logits: Array, windows: Array, sizes: Array) -> Array:
        """Each image's answer, squashed to THUMBNAIL pixels a side."""
        scale = THUMBNAIL / jnp.tile(sizes.astype(jnp.float32), 2)
        return join(logits, windows * scale[:, None], (THUMBNAIL, THUMBNAIL)).argmax(-1).astype(jnp.uint8)


def confusion_matrix(
    labels: Int[Array, "height width"], answers: Int[Array, "height width"], num_classes: int
) -> Int[Array, "classes classes"]:
    """Number of pixels by class (row) and answer (column), int32; pixels whose label is IGNORED are left out."""
    # Each pair (label, answer) becomes one number, so that bincount counts pairs; beyond its length nothing is counted.
    pairs = jnp.where(labels == IGNORED, num_classes**2, labels * num_classes + answers)
    return jnp.bincount(pairs.ravel(), length=num_classes**2).reshape(num_classes, num_classes)
