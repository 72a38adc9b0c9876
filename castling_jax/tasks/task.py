"""What training, evaluation and the tools know of a task. They know nothing else of labels, boxes or masks.

A new task is a folder beside classification/ with a subclass of Task, a line in registry.py, and a model whose `task`
names it. training/step.py and training/evaluate.py call its methods; read those two to see when.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import Variables
from castling_jax.preprocessing import Preprocessing

FORMS = ("train_form", "inference_form")
Batch = dict[str, jax.Array]
Example = dict[str, Any]
Rows = Float[Array, "batch"]
# The terms of each example's loss by name, and each example's weight. The step divides the sum of all terms over the
# global batch by the sum of the weights. None weighs every example by one: the mean over the examples.
Loss = tuple[Mapping[str, Rows], Rows | None]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of merit of a task. Figures hold it as NAME_train_form and NAME_inference_form.

    Attributes:
      name: such as "accuracy".
      title: as a summary's table shows it.
      short: as a line of text shows it, behind the number.
      is_share: whether the figure is a share, shown in percent.
      larger_is_better: whether the best checkpoint is the one with the largest figure.
    """

    name: str
    title: str
    short: str
    is_share: bool = True
    larger_is_better: bool = True

    @property
    def best(self) -> str:
        """The figure that checkpoints are compared by: the inference form's, which the run is for."""
        return f"{self.name}_inference_form"

    @property
    def worst(self) -> float:
        """Worse than any evaluation: the figure of a checkpoint that was not evaluated."""
        return -1.0 if self.larger_is_better else 1e9

    def score(self, figures: Mapping[str, Any]) -> float:
        """What is larger for better figures."""
        figure = float(figures[self.best])
        return figure if self.larger_is_better else -figure

    def text(self, figure: float) -> str:
        """The figure as a person reads it: "98.25 %"."""
        return f"{100 * figure:.2f} %" if self.is_share else f"{figure:.4f}"

    def texts(self, figures: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Of the training form and of the inference form; `prefix`: "raw_" or "averaged_", of such weights."""
        return [self.text(figures[f"{prefix}{self.name}_{form}"]) for form in FORMS]

    def is_in(self, figures: Mapping[str, Any], prefix: str = "") -> bool:
        """Whether the figures have it: the top 5 of four classes, for one, do not exist."""
        return f"{prefix}{self.best}" in figures


class Answers(Protocol):
    """What both forms answer to the examples of a split, in its order; corrupt examples are left out."""

    def figures(self) -> dict[str, float]:
        """The task's measures of both forms, eval_loss where there is one, max_difference (the largest difference
        between the two forms' outputs), eval_images and eval_corrupt (counts)."""

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{class: {"images": count, MEASURE: of the inference form, None without images}}."""

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """Names and contents of the files that an evaluation writes beside its figures."""


class Task:
    """What is learnt: a value that is made once a run, and is constant in the compiled step.

    Attributes:
      name: as the registry and summary.json have it.
      measures: the first of them is the one that chooses the best checkpoint, and that pictures and tables show.
      augmentations: the fields of a configuration's `augment` that the task has; the others must be at their defaults.
      loss_title: what the loss is, with its unit, for the axis of a picture.
      held: arrays that the loss needs beside the batch, such as a teacher's variables: an argument of the compiled
        step, where a value that Python closes over would become a constant of the program.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    augmentations: ClassVar[tuple[str, ...]] = ()
    loss_title: ClassVar[str]

    @property
    def held(self) -> Any:
        return {}

    @property
    def other_models(self) -> tuple[Backbone, ...]:
        """Models that run in the step beside the one that learns."""
        return ()

    @classmethod
    def from_config(cls, config: ConfigDict, model: Backbone, teacher: "Teacher | None" = None) -> "Task":
        """The task of a run.

        Args:
          config: as `default_config` gives it.
          model: the model that learns.
          teacher: what it learns from beside the data, if anything.

        Raises:
          InputError: the task does not take a field of the configuration.
        """
        raise NotImplementedError

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        """What the host does to an example in training. It draws from its second argument alone, and can be pickled.

        Where images of several sizes are learnt from, it is a `OneOf` of data/loader.py, a transform for each size.

        Raises:
          InputError: a field is out of range.
        """
        raise NotImplementedError

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        """What the host does to an example in an evaluation; it can be pickled."""
        raise NotImplementedError

    @staticmethod
    def example_shapes(image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one transformed example, which a batch stacks: what sharding and the compile report go by."""
        raise NotImplementedError

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """A batch as the model ("image") and the loss take it, such as mixed. Runs on the devices, inside the step."""
        raise NotImplementedError

    @property
    def changes_batches(self) -> bool:
        """Whether `prepare` changes the images: a contact sheet then shows prepared batches too."""
        return False

    def caption(self, example: Example) -> str:
        """What a contact sheet writes beside an example: one of the data set's, or a prepared one."""
        raise NotImplementedError

    def draw(self, axis: Axes, example: Example) -> None:
        """Draws what a transformed example holds beside its image into the picture of that image; a label is no such
        thing."""

    def loss(self, outputs: Any, batch: Batch, held: Any) -> Loss:
        """Each example's loss and weight; an example's loss may be a sum over its boxes or pixels.

        Args:
          outputs: the model's in training mode, as `forward_train` gives them.
          batch: what `prepare` returned, or an equal part of it.
          held: the task's, traced.
        """
        raise NotImplementedError

    def answer(self, outputs: Mapping[str, Any], exact: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """What an evaluation keeps of each example: arrays with the batch's rows along the first axis.

        Args:
          outputs: the model's, by form, as `apply` gives them.
          exact: the same, computed so that the forms' difference is not lost in rounding.
          batch: as `eval_transform` made it, with `weight` 0 for padding.
        """
        raise NotImplementedError

    def collect(self, answers: dict[str, np.ndarray], corrupt: int) -> Answers:
        """The answers to a whole split.

        Args:
          answers: as `answer` gave them, without padding; and `image`, the number of each example in the split.
          corrupt: how many examples were left out.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model that another one learns from.

    Attributes:
      model: in inference form.
      variables: the model's.
      kind: of the loss, as `distillation_loss` takes it.
      alpha: the share of that loss.
      temperature: as `distillation_loss` takes it.
    """

    model: Backbone
    variables: Variables
    kind: str
    alpha: float
    temperature: float
