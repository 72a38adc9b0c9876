"""The tasks by name, and the task that a model is for."""

from collections.abc import Mapping
from typing import Any

from castling_jax.data.sources import Dataset, Unread
from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.tasks.classification.task import Classification
from castling_jax.tasks.detection.task import Detection
from castling_jax.tasks.reconstruction.task import Reconstruction
from castling_jax.tasks.segmentation.task import Segmentation
from castling_jax.tasks.task import Measure, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Detection, Reconstruction, Segmentation)}


def task_of(model: Model) -> type[Task]:
    """The task that a model is for."""
    return TASKS[model.task]


def unused_fields(model: Model) -> frozenset[str]:
    """Fields of a configuration that other tasks or other models use, and a run of this model does not."""
    return frozenset(name for task in TASKS.values() for name in task.fields) - task_of(model).used_fields(model)


def check_dataset(model: Model, dataset: Dataset) -> None:
    """Checks that the model's task can use a data set.

    Args:
      model: the model.
      dataset: a split of the data set.

    Raises:
      InputError: the images are annotated otherwise than the task needs, or not at all.
    """
    task = task_of(model)
    if task.annotation not in (dataset.annotation, None):
        raise InputError(f"{model.spec.name} needs images with {task.annotation}, and these have {dataset.annotation}.")
    if not isinstance(dataset, Unread):  # an absent data set's images are not known
        task.check_annotated(dataset)


def task_in(figures: Mapping[str, Any]) -> type[Task]:
    """The task of a run with these figures; an earlier version's figures name none, and belong to classification."""
    return TASKS[figures.get("task", "classification")]


def measures_of(figures: Mapping[str, Any]) -> tuple[Measure, ...]:
    """The measures that a run's figures contain, the main one first."""
    return tuple(measure for measure in task_in(figures).measures if measure.is_in(figures))
