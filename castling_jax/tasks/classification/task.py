"""Classification as a task: mixed and smoothed labels, distillation from a teacher, and top-1 and top-5 accuracy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from castling_jax.data.sources import Dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.errors import printable
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize, image_shape
from castling_jax.tasks.classification.answers import TOP, ClassAnswers
from castling_jax.tasks.classification.losses import cross_entropy, distillation_loss
from castling_jax.tasks.classification.mixing import mix
from castling_jax.tasks.classification.predictions import ClassPredictions
from castling_jax.tasks.classification.transforms import train_transform
from castling_jax.tasks.task import Batch, Example, Loss, Measure, Task, Teacher, check_no_windows

NO_MIXING = MappingProxyType({"mixup": 0.0, "cutmix": 0.0, "switch": 0.5, "probability": 1.0})


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Batches are {"image", "label" [batch] int32}; outputs in training are the heads' logits [heads, batch, classes].

    If boxes of images are erased, a batch also has "erased" [batch, 4], the boxes.

    If there is a teacher and the model has two heads, the second head learns from the teacher alone and the first one
    from the labels alone (Touvron et al., DeiT, section 4); a single head learns from both.

    Attributes:
      num_classes: number of classes.
      label_smoothing: share of each label that is spread over all classes.
      mixing: the options of `mix`: mixup, cutmix, switch, probability and mix_rows.
      teacher: a model to learn from beside the labels; None for none.
      erases: whether boxes of images are erased.
    """

    name = "classification"
    measures = (
        Measure("accuracy", "held-out accuracy", "top-1"),
        Measure(f"top{TOP}_accuracy", f"  top {TOP}", f"top-{TOP}"),
    )
    fields = (
        *("augment.crop_scale", "augment.flip", "augment.randaugment", "augment.color_jitter", "augment.shift_pixels"),
        *("augment.erasing", "augment.repeats", "augment.mixup", "augment.cutmix", "augment.mix_switch"),
        *("augment.mix_probability", "augment.mix_rows", "loss.label_smoothing", "distillation.kind"),
        *("distillation.alpha", "distillation.temperature", "distillation.teacher", "distillation.name"),
    )
    annotation = "label"
    loss_title = "cross entropy (nats)"
    predictions = ClassPredictions

    num_classes: int
    label_smoothing: float = 0.0
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_MIXING)
    teacher: Teacher | None = None
    erases: bool = False

    @property
    def held(self) -> Variables:
        return {} if self.teacher is None else self.teacher.variables

    @property
    def other_models(self) -> tuple[Model, ...]:
        return () if self.teacher is None else (self.teacher.model,)

    @classmethod
    def from_config(
        cls, config: ConfigDict, model: Model, teacher: Teacher | None = None, *, steps_per_epoch: int = 1
    ) -> "Classification":
        check_no_windows(config.dataset)
        return cls(
            model.spec.num_classes,
            config.loss.label_smoothing,
            mixing_options(config.augment),
            teacher,
            erases=config.augment.erasing > 0,
        )

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        return train_transform(augment, preprocessing)

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        return EvalTransform(preprocessing)

    def example_shapes(self, image_size: ImageSize) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {
            "image": jax.ShapeDtypeStruct((*image_shape(image_size), 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        }
        return shapes | ({"erased": jax.ShapeDtypeStruct((4,), jnp.int32)} if self.erases else {})

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        options = {"num_classes": self.num_classes, "label_smoothing": self.label_smoothing, **self.mixing}
        images, targets = mix(batch["image"], batch["label"], key, **options)
        return {"image": images, "target": targets}

    @property
    def changes_batches(self) -> bool:
        return bool(self.mixing["mixup"] or self.mixing["cutmix"])

    def caption(self, example: Example, classes: Sequence[str]) -> str:
        if "label" in example:
            return printable(classes[example["label"]])
        target = example["target"]
        # A mixed image has two classes; all others have the target that label smoothing alone gives, in float32.
        smallest = self.label_smoothing / self.num_classes + 1e-6
        heaviest = [label for label in np.argsort(-target)[:2] if target[label] > smallest]
        return ", ".join(f"{printable(classes[label])}: {target[label]:.2f}" for label in heaviest)

    def loss(self, outputs: Float[Array, "heads batch classes"], batch: Batch, held: Variables) -> Loss:
        if self.teacher is None:
            return {"cross_entropy": cross_entropy(outputs.mean(axis=0), batch["target"])}, None
        # The teacher sees the mixed images that the student sees, and its variables come from `held`: see Task.
        teacher_logits = apply(self.teacher.model, held, batch["image"])
        # outputs[0] and outputs[-1] are two heads, or the same one.
        from_labels = cross_entropy(outputs[0], batch["target"])
        kind, alpha, temperature = self.teacher.kind, self.teacher.alpha, self.teacher.temperature
        from_teacher = distillation_loss(outputs[-1], teacher_logits, kind=kind, temperature=temperature)
        return {"distillation": (1 - alpha) * from_labels + alpha * from_teacher}, None

    def answer(
        self,
        outputs: Mapping[str, Float[Array, "batch classes"]],
        exact: Mapping[str, Float[Array, "batch classes"]],
        batch: Batch,
    ) -> dict[str, jax.Array]:
        labels = batch["label"]
        answers = {"label": labels}
        for form, logits in outputs.items():
            answers |= {form: logits.argmax(-1), f"top_{form}": _is_among_the_first(labels, logits)}
        return answers | {
            "loss": optax.softmax_cross_entropy_with_integer_labels(outputs["inference_form"], labels),
            "difference": jnp.max(jnp.abs(exact["train_form"] - exact["inference_form"]), axis=-1),
        }

    def collect(self, answers: dict[str, np.ndarray], dataset: Dataset, corrupt: int) -> ClassAnswers:
        return ClassAnswers(self.num_classes, **answers, corrupt=corrupt)


def mixing_options(augment: ConfigDict) -> dict[str, Any]:
    """The options of `mix`, from the group `augment` of a configuration."""
    return {
        "mixup": augment.mixup,
        "cutmix": augment.cutmix,
        "switch": augment.mix_switch,
        "probability": augment.mix_probability,
        "mix_rows": augment.mix_rows,
    }


def _is_among_the_first(labels: Float[Array, "batch"], logits: Float[Array, "batch classes"]) -> Bool[Array, "batch"]:
    """Whether each label is among the TOP largest logits; always, if there are no more classes than that."""
    _, first = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return (first == labels[:, None]).any(-1)
