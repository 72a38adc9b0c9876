"""The tasks by name, and the task that a model is for."""

from collections.abc import Mapping
from typing import Any

from castling_jax.data.sources import Dataset
from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.tasks.classification.task import Classification
from castling_jax.tasks.detection.task import Detection
from castling_jax.tasks.task import Measure, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Detection)}


def task_of(model: Model) -> type[Task]:
    """The task that a model is for."""
    return TASKS[model.task]


def check_annotation(model: Model, dataset: Dataset) -> None:
    """Raises an InputError unless the data set's images are annotated with what the model's task needs."""
    needed = task_of(model).annotation
    if dataset.annotation != needed:
        raise InputError(f"{model.spec.name} needs images with {needed}, and these have {dataset.annotation}.")


def task_in(figures: Mapping[str, Any]) -> type[Task]:
    """The task of a run with these figures; an earlier version's figures name none, and belong to classification."""
    return TASKS[figures.get("task", "classification")]


def measures_of(figures: Mapping[str, Any]) -> tuple[Measure, ...]:
    """The measures that a run's figures contain, the main one first."""
    return tuple(measure for measure in task_in(figures).measures if measure.is_in(figures))
