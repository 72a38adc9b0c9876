"""Reconstruction as a task: images with hidden patches, whose pixels a masked autoencoder predicts. No labels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from castling_jax.convert.inference import largest_difference
from castling_jax.data.sources import Dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.models.mae import MAE
from castling_jax.models.model import Model
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize, image_shape
from castling_jax.tasks.classification.transforms import TrainTransform, train_transform
from castling_jax.tasks.reconstruction.answers import ReconstructionAnswers
from castling_jax.tasks.reconstruction.losses import reconstruction_loss
from castling_jax.tasks.reconstruction.predictions import ReconstructionPredictions
from castling_jax.tasks.task import (
    FORMS,
    Batch,
    Example,
    Loss,
    Measure,
    Task,
    Teacher,
    check_no_teacher,
    check_no_windows,
)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Task):
    """Batches are {"image"}; outputs are those of `MAE.training_outputs`.

    The step's key draws the hidden patches. An evaluation hides the same patches in both forms: which ones depends on
    an image's place in its batch, modulo 16.

    Attributes:
      patch_size: side of a patch in pixels.
      norm_pix_loss: whether the model predicts normalised patches.
    """

    name = "reconstruction"
    measures = (
        Measure("reconstruction_loss", "held-out reconstruction loss", "loss", is_share=False, larger_is_better=False),
    )
    fields = (
        *("augment.crop_scale", "augment.flip", "augment.color_jitter", "augment.randaugment", "augment.shift_pixels"),
        "augment.repeats",
    )
    annotation: ClassVar[str | None] = None
    loss_title = "squared error of hidden pixels"
    predictions = ReconstructionPredictions

    patch_size: int
    norm_pix_loss: bool

    @classmethod
    def from_config(
        cls, config: ConfigDict, model: Model, teacher: Teacher | None = None, *, steps_per_epoch: int = 1
    ) -> "Reconstruction":
        check_no_teacher(teacher, "a masked autoencoder")
        check_no_windows(config.dataset)
        autoencoder = cast(MAE, model)
        return cls(autoencoder.backbone.patch_size, autoencoder.norm_pix_loss)

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        return ImageTransform(train_transform(augment, preprocessing))

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        return ImageEvalTransform(EvalTransform(preprocessing))

    def example_shapes(self, image_size: ImageSize) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((*image_shape(image_size), 3), jnp.uint8)}

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        return batch

    def caption(self, example: Example, classes: Sequence[str]) -> str:
        return ""

    def loss(self, outputs: Mapping[str, Array], batch: Batch, held: Any) -> Loss:
        return {"reconstruction": self._losses(outputs, batch)}, None

    def answer(
        self, outputs: Mapping[str, Mapping[str, Array]], exact: Mapping[str, Mapping[str, Array]], batch: Batch
    ) -> dict[str, jax.Array]:
        difference = jax.vmap(lambda one, other: largest_difference(one, other, 1))
        losses = {form: self._losses(outputs[form], batch) for form in FORMS}
        return losses | {"difference": difference(*(exact[form] for form in FORMS))}

    def collect(self, answers: dict[str, np.ndarray], dataset: Dataset, corrupt: int) -> ReconstructionAnswers:
        return ReconstructionAnswers(**answers, corrupt=corrupt)

    def _losses(self, outputs: Mapping[str, Array], batch: Batch) -> Array:
        return reconstruction_loss(
            outputs["reconstruction"],
            outputs["mask"],
            batch["image"],
            patch_size=self.patch_size,
            normalize=self.norm_pix_loss,
        )


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """A classifier's augmentations, without the label. It can be pickled."""

    transform: TrainTransform

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {"image": self.transform({"image": example["image"], "label": 0}, rng)["image"]}


@dataclasses.dataclass(frozen=True)
class ImageEvalTransform:
    """Evaluation's transform of the image alone. It can be pickled."""

    transform: EvalTransform

    def __call__(self, example: Example) -> Example:
        return self.transform({"image": example["image"]})
