"""Detection as a task: assigned boxes, PicoDet's losses, suppressed detections, and COCO's average precision."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from castling_jax.convert.inference import largest_difference
from castling_jax.convert.run_folder import suppression_of
from castling_jax.data.annotations import BoxDataset
from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.models.picodet import check_image_size
from castling_jax.ops.points import level_points
from castling_jax.ops.suppression import non_maximum_suppression
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize, image_shape
from castling_jax.tasks.detection.answers import Answered, BoxAnswers, check_objects
from castling_jax.tasks.detection.assign import assign_atss, assign_simota, assign_tal
from castling_jax.tasks.detection.losses import Assigned, Outputs, detection_losses, legacy_detection_losses
from castling_jax.tasks.detection.predictions import BoxPredictions, in_the_image
from castling_jax.tasks.detection.transforms import eval_transform, train_transform
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


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """Batches are {"image", "boxes" [batch, max_boxes, 4] in pixels, "classes", "valid" [batch, max_boxes]}.

    A box is assigned to points by ATSS in the first steps, which needs no good predictions, and by TAL from `tal_step`
    on, as PicoDet v2 is trained. The legacy head has SimOTA from the first step to the last.

    Attributes:
      num_classes: number of classes.
      legacy: whether the model has PicoDet's legacy head.
      tal_step: first step, counted from 0, with TAL instead of ATSS.
      max_boxes: number of boxes that an example has room for.
      suppression: how outputs become detections.
      exif: whether images are turned as their EXIF orientation says.
    """

    name = "detection"
    measures = (
        Measure("mAP", "held-out mAP", "mAP"),
        Measure("AP50", "  AP at IoU 0.50", "AP50"),
        Measure("AP75", "  AP at IoU 0.75", "AP75"),
    )
    fields = (
        *("augment.flip", "augment.box_crop", "augment.distort", "augment.image_sizes", "augment.max_boxes"),
        *("augment.repeats", "loss.atss_epochs", "evaluation.score_threshold", "evaluation.iou_threshold"),
        "evaluation.max_detections",
    )
    annotation = "boxes"
    loss_title = "varifocal + GIoU + distribution focal loss"
    predictions = BoxPredictions

    num_classes: int
    legacy: bool
    tal_step: int
    max_boxes: int
    suppression: Suppression
    exif: bool

    @classmethod
    def from_config(
        cls, config: ConfigDict, model: Model, teacher: Teacher | None = None, *, steps_per_epoch: int = 1
    ) -> "Detection":
        legacy = _is_legacy(model)
        check_no_teacher(teacher, "a detector")
        if legacy and config.train.accumulate_steps > 1:
            raise InputError(
                "config.train.accumulate_steps must be 1 with neck='csp_pan', whose losses are divided by two numbers "
                f"of the whole batch, not {config.train.accumulate_steps}."
            )
        data = config.dataset
        check_crop(data, ("squash",), "a detector")
        for size in config.augment.image_sizes or ():
            check_image_size(image_shape(size))
        return cls(
            num_classes=model.spec.num_classes,
            legacy=legacy,
            tal_step=round(config.loss.atss_epochs * steps_per_epoch),
            max_boxes=config.augment.max_boxes,
            suppression=suppression_of(config),
            exif=data.exif,
        )

    @classmethod
    def used_fields(cls, model: Model) -> frozenset[str]:
        return super().used_fields(model) - ({"loss.atss_epochs"} if _is_legacy(model) else set())

    @classmethod
    def check_annotated(cls, dataset: Dataset) -> None:
        check_objects(cast(BoxDataset, dataset), range(len(dataset)))

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        return train_transform(augment, preprocessing)

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        return eval_transform(preprocessing)

    def example_shapes(self, image_size: ImageSize) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": jax.ShapeDtypeStruct((*image_shape(image_size), 3), jnp.uint8),
            "boxes": jax.ShapeDtypeStruct((self.max_boxes, 4), jnp.float32),
            "classes": jax.ShapeDtypeStruct((self.max_boxes,), jnp.int32),
            "valid": jax.ShapeDtypeStruct((self.max_boxes,), jnp.bool_),
        }

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        # One flag for each example, because accumulation cuts every array of a batch into parts.
        return batch | {"by_tal": jnp.broadcast_to(step >= self.tal_step, len(batch["image"]))}

    def caption(self, example: Example, classes: Sequence[str]) -> str:
        count = int(np.sum(example["valid"])) if "valid" in example else len(example["boxes"])
        return f"{count} box" + "es" * (count != 1)

    def draw(self, axis: "Axes", example: Example, classes: Sequence[str]) -> None:
        if "valid" in example:  # a transformed example; evaluation's has no boxes
            boxes, labels = (np.asarray(example[name])[example["valid"]] for name in ("boxes", "classes"))
            from castling_jax.plots import draw_boxes_on  # here, because matplotlib takes half a second to import

            draw_boxes_on(axis, boxes, [classes[label] for label in labels])

    def loss(self, outputs: Mapping[str, Array], batch: Batch, held: Any) -> Loss:
        height, width = batch["image"].shape[1:3]
        points, strides, counts = level_points((height, width))

        def simota(scores: Array, found: Array, boxes: Array, classes: Array, valid: Array) -> Assigned:
            return assign_simota(points, strides, scores, found, boxes, classes, valid)

        def atss(scores: Array, found: Array, boxes: Array, classes: Array, valid: Array) -> Assigned:
            return assign_atss(points, strides, counts, found, boxes, classes, valid, self.num_classes)

        def tal(scores: Array, found: Array, boxes: Array, classes: Array, valid: Array) -> Assigned:
            return assign_tal(points, scores, found, boxes, classes, valid)

        # An assignment is a target: the loss must not lead predictions to where they get other boxes.
        predicted = [jax.lax.stop_gradient(outputs[name]) for name in ("scores", "boxes")]
        arguments = (*predicted, *(batch[name] for name in ("boxes", "classes", "valid")))
        if self.legacy:
            terms = _for_each(legacy_detection_losses, outputs, jax.vmap(simota)(*arguments), points, strides)
            return _divided(terms), None
        # Both assigners are in the program, and one of them runs: the step stays one program for the whole run.
        assigned = jax.lax.cond(batch["by_tal"].all(), jax.vmap(tal), jax.vmap(atss), *arguments)
        terms = _for_each(detection_losses, outputs, assigned, points, strides)
        return terms, terms.pop("normaliser")

    def answer(
        self, outputs: Mapping[str, Outputs], exact: Mapping[str, Outputs], batch: Batch
    ) -> dict[str, jax.Array]:
        height, width = batch["image"].shape[1:3]
        answers: dict[str, jax.Array] = {}
        for form in FORMS:
            found = non_maximum_suppression(**outputs[form], **self.suppression.to_dict())
            boxes = in_the_image(found["boxes"], batch)
            answers |= {f"{form}_boxes": boxes, f"{form}_scores": found["scores"], f"{form}_classes": found["classes"]}
        # Image by image: the largest difference over the images of a split is the split's.
        difference = jax.vmap(lambda one, other: largest_difference(one, other, max(height, width)))
        return answers | {"difference": difference(*(exact[form] for form in FORMS))}

    def collect(self, answers: dict[str, np.ndarray], dataset: Dataset, corrupt: int) -> BoxAnswers:
        forms = {
            form: Answered(*(answers[f"{form}_{name}"] for name in ("boxes", "scores", "classes"))) for form in FORMS
        }
        return BoxAnswers(
            cast(BoxDataset, dataset),
            answers["image"],
            **forms,
            difference=answers["difference"],
            corrupt=corrupt,
            exif=self.exif,
        )


def _is_legacy(model: Model) -> bool:
    return dict(model.spec.overrides).get("neck") == "csp_pan"


def _for_each(losses: Any, outputs: Outputs, assigned: Assigned, points: Any, strides: Any) -> dict[str, jax.Array]:
    """The sums of each example, [batch], in the place of sums over the batch."""
    return dict(jax.vmap(lambda outputs, assigned: losses(outputs, assigned, points, strides))(outputs, assigned))


def _divided(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The legacy losses, divided by the batch's numbers: the mean over the rows is then the loss."""
    weights, positives = terms.pop("normaliser"), terms.pop("positives")
    divisors = {"varifocal": positives, "giou": weights, "dfl": weights}
    return {name: len(term) * term / jnp.maximum(divisors[name].sum(), 1) for name, term in terms.items()}
