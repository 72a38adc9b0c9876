"""The interface between a task and training, evaluation and the tools, which know nothing about labels or boxes.

A new task is a folder beside classification/ with a subclass of Task, a line in registry.py, and a model whose `task`
names it. training/step.py and training/evaluate.py call its methods; read those two to see when.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError, check
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMS = ("train_form", "inference_form")
Batch = dict[str, jax.Array]
Example = dict[str, Any]
Rows = Float[Array, "batch"]
# (name -> that term of each example's loss, each example's weight). The step sums all terms over the global batch and
# divides by the sum of the weights. Weights of None stand for ones: the loss is the mean over the examples.
Loss = tuple[Mapping[str, Rows], Rows | None]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of merit of a task. Figures hold it as NAME_train_form and NAME_inference_form.

    Attributes:
      name: identifier, such as "accuracy".
      title: name in a summary's table.
      short: name in a line of text, after the number.
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
        """Name of the figure that checkpoints are compared by: the inference form's, because the run exports it."""
        return f"{self.name}_inference_form"

    def score(self, figures: Mapping[str, Any]) -> float:
        """A score that is larger for better figures, whatever the measure."""
        figure = float(figures[self.best])
        return figure if self.larger_is_better else -figure

    def text(self, figure: float) -> str:
        """The figure as a person reads it: "98.25 %"."""
        return f"{100 * figure:.2f} %" if self.is_share else f"{figure:.4f}"

    def texts(self, figures: Mapping[str, Any], prefix: str = "") -> list[str]:
        """The training and the inference form's figures as texts; `prefix` "raw_" or "averaged_" picks the weights."""
        return [self.text(figures[f"{prefix}{self.name}_{form}"]) for form in FORMS]

    def is_in(self, figures: Mapping[str, Any], prefix: str = "") -> bool:
        """Whether the figures contain this measure: a top-5 accuracy, for one, needs more than five classes."""
        return f"{prefix}{self.best}" in figures


class Answers(Protocol):
    """Both forms' answers to the examples of a split, in its order; corrupt examples are left out."""

    def figures(self) -> dict[str, float]:
        """The task's measures of both forms, eval_loss where there is one, max_difference (the largest difference
        between the two forms' outputs), eval_images and eval_corrupt (counts)."""

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{class: {"images": count, MEASURE: the inference form's figure, or None for a class without images}}."""

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """{name: content} of the files that an evaluation writes beside its figures."""


class Task:
    """A task: what a model learns. A run makes one value, which is constant in the compiled step.

    Attributes:
      name: the task's name in the registry and in summary.json.
      measures: the task's measures. The first one chooses the best checkpoint, and pictures and tables show it.
      fields: fields of a configuration that not every task uses, but this one does.
      annotation: how the images of the task are annotated, as `Dataset.annotation` states it: "label", for one. None if
        annotations are not used.
      loss_title: name of the loss with its unit, for the axis of a picture.
      predictions: what the trained model says about images.
      held: arrays that the loss needs beside the batch, such as a teacher's variables. They are an argument of the
        compiled step; arrays in a closure would become constants of the program.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    fields: ClassVar[tuple[str, ...]] = ()
    annotation: ClassVar[str | None]
    loss_title: ClassVar[str]
    predictions: ClassVar[type["Predictions"]]

    @property
    def held(self) -> Any:
        return {}

    @property
    def other_models(self) -> tuple[Model, ...]:
        """Models that run in the step beside the one that learns, such as a teacher."""
        return ()

    @classmethod
    def from_config(
        cls, config: ConfigDict, model: Model, teacher: "Teacher | None" = None, *, steps_per_epoch: int = 1
    ) -> "Task":
        """Builds the task of a run.

        Args:
          config: the configuration, with the fields of `default_config`.
          model: the model that learns.
          teacher: a model to learn from, beside the data; None for none.
          steps_per_epoch: steps of an epoch, for a loss that changes in the course of training.

        Raises:
          InputError: the task does not support a field of the configuration.
        """
        raise NotImplementedError

    @classmethod
    def used_fields(cls, model: Model) -> frozenset[str]:
        """Those of `fields` that have an effect on a run of the model."""
        return frozenset(cls.fields)

    @classmethod
    def check_annotated(cls, dataset: Dataset) -> None:
        """Raises an InputError if no image of a split has what the task learns. By default any split will do."""

    @staticmethod
    def train_transform(
        augment: ConfigDict, preprocessing: Preprocessing
    ) -> Callable[[Example, np.random.Generator], Example]:
        """Returns the host's transform of a training example: picklable, and random only through its second argument.

        The example's "image" is uint8 [height, width, 3], or floats that are normalised already; `finish_images` of
        images.py says which other arrays concern the image.
        Where images of several sizes are learnt from, it is a `OneOf` of data/loader.py, a transform for each size.

        Raises:
          InputError: a field is out of range.
        """
        raise NotImplementedError

    @staticmethod
    def eval_transform(preprocessing: Preprocessing) -> Callable[[Example], Example]:
        """Returns the host's transform of an example for evaluation, "image" as in training; it can be pickled."""
        raise NotImplementedError

    @classmethod
    def split_transform(cls, preprocessing: Preprocessing, dataset: Dataset) -> Callable[[Example], Example]:
        """`eval_transform` for the examples of a split, whose annotations the answers are compared with."""
        return cls.eval_transform(preprocessing)

    def example_shapes(self, image_size: ImageSize) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a transformed example's arrays, for a data set with images of 8 bits.

        The compile report has no data, and asks for them.
        """
        raise NotImplementedError

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array) -> Batch:
        """Makes a batch ready for the model (its "image") and the loss, by mixing for example. Runs inside the step.

        Args:
          batch: examples from `train_transform`, stacked, with finished images: see `finish_images` of images.py.
          key: the step's own random key.
          step: the step's number, from 0.
        """
        raise NotImplementedError

    @property
    def changes_batches(self) -> bool:
        """Whether `prepare` changes the images: a contact sheet then shows prepared batches too."""
        return False

    def caption(self, example: Example, classes: Sequence[str]) -> str:
        """The text beside an example in a contact sheet.

        Args:
          example: an example of the data set, or one that `prepare` returned.
          classes: names of the classes.
        """
        raise NotImplementedError

    def draw(self, axis: "Axes", example: Example, classes: Sequence[str]) -> None:
        """Draws an example's annotations, such as boxes, over its image in `axis`. By default nothing is drawn."""

    def loss(self, outputs: Any, batch: Batch, held: Any) -> Loss:
        """Each example's loss and weight; an example's loss may be a sum over its boxes or pixels.

        Args:
          outputs: the model's outputs in training mode, from `forward_train`.
          batch: the batch that `prepare` returned, or one of its equal parts.
          held: the task's `held`, traced.
        """
        raise NotImplementedError

    def answer(self, outputs: Mapping[str, Any], exact: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """What an evaluation keeps for each example: arrays with the batch's rows along the first axis.

        Args:
          outputs: form -> the model's outputs in that form, from `apply`.
          exact: the same outputs, computed in float32 where rounding would hide the difference of the forms.
          batch: examples from `eval_transform`, stacked, with finished images; and `weight`, which is 0 for padding.
        """
        raise NotImplementedError

    def collect(self, answers: dict[str, np.ndarray], dataset: Dataset, corrupt: int) -> Answers:
        """Puts the answers to a whole split together.

        Args:
          answers: the arrays that `answer` returned, joined and without padding; and `image`, each example's number in
            the split.
          dataset: the split, whose annotations some tasks compare the answers with.
          corrupt: number of corrupt examples, which were left out.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a trained model says about images without annotations, and how a person gets to see it.

    Attributes:
      names: names of the classes.
      preprocessing: how an image became the model's input.
      suppression: how a detector's outputs become detections.
      top: most predictions to list for an image; None takes the task's own number.
      score_threshold: smallest score of a detection.
      category_ids: the number of each class in the annotations of the data; None if it is not known.
      batch_size: number of images that are computed together.
    """

    batch_size: ClassVar[int] = 32

    names: Sequence[str]
    preprocessing: Preprocessing
    suppression: Suppression
    top: int | None
    score_threshold: float
    category_ids: Sequence[int] | None = None

    def compute(self, model: Model, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Computes the predictions for images, on the device.

        Args:
          model: the model in inference form.
          variables: the model's variables.
          batch: examples from the task's `eval_transform`, stacked, with finished images.

        Returns:
          Arrays with the images along the first axis.
        """
        raise NotImplementedError

    def answer(self, found: Mapping[str, np.ndarray]) -> Any:
        """The answer that `castling_jax.predict` returns for an image, from its rows of `compute`'s arrays."""
        raise NotImplementedError

    def text(self, answer: Any) -> str:
        """The answer in a line."""
        raise NotImplementedError

    def table(self, answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        """A table of (image, its answer or the InputError of an image that cannot be read), with a header."""
        raise NotImplementedError

    def draw(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> "Figure":
        """A sheet of images with their answers."""
        raise NotImplementedError

    def coco_results(self, answers: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
        """COCO's results for (image, answer), with the images' paths as ids, and the classes' names beside their ids.

        The ids are `category_ids`; if these are not known, the classes are counted from 1.

        Raises:
          InputError: the task finds no boxes.
        """
        raise InputError("--json is for a detector's boxes: other answers go to --csv.")

    def label_map(self, answer: Any) -> UInt8[np.ndarray, "height width"]:
        """The class of each pixel of an image.

        Raises:
          InputError: the task does not give pixels classes.
        """
        raise InputError("--labels is for a segmenter's masks: other answers go to --csv.")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model that another one learns from.

    Attributes:
      model: the teacher, in inference form.
      variables: the teacher's variables.
      kind: "hard" or "soft", for `distillation_loss`.
      alpha: the distillation loss's share of the whole loss.
      temperature: temperature of the soft loss.
    """

    model: Model
    variables: Variables
    kind: str
    alpha: float
    temperature: float


def seen_images(batch: Batch) -> Float[Array, "rows height width 3"]:
    """The images of a batch as the model takes them: an image that it sees in several windows has a row for each."""
    return batch["image"].reshape(-1, *batch["image"].shape[-3:])


def check_no_teacher(teacher: Teacher | None, learner: str) -> None:
    """Refuses a teacher for a model that learns from the data alone; `learner` names such a model."""
    check(teacher is None, f"{learner} does not learn from a teacher: leave out config.distillation.")


def check_crop(data: ConfigDict, modes: Sequence[str], learner: str) -> None:
    """Refuses a group `dataset` of a configuration that cuts images, for `learner`, which sees whole images.

    Args:
      data: the group.
      modes: the values of crop_mode that the learner supports.
      learner: what names such a model.
    """
    if data.crop_mode not in modes or data.crop_ratio != 1.0:
        allowed = " or ".join(map(repr, modes))
        raise InputError(
            f"{learner} sees whole images: set config.dataset.crop_mode = {allowed} and crop_ratio = 1.0, not "
            f"{data.crop_mode!r} and {data.crop_ratio}."
        )


def check_no_windows(data: ConfigDict) -> None:
    """Refuses a group `dataset` of a configuration that has the model see an image in several windows."""
    check(data.crop_mode != "slide", "config.dataset.crop_mode = 'slide' is for segmenters: take 'center' or 'squash'.")
