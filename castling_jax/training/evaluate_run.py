"""Evaluates a trained run on any labelled data, for `main.py --evaluate` and for the test split at a run's end."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.convert.run_folder import exported_weights
from castling_jax.convert.weights import Weights, read
from castling_jax.data.fingerprint import check_same_classes
from castling_jax.data.sources import Dataset, path_of
from castling_jax.errors import InputError, printable, refusing
from castling_jax.storage import absolute, write_atomically
from castling_jax.tables import aligned
from castling_jax.tasks.registry import check_dataset, measures_of, task_of, unused_fields
from castling_jax.tasks.task import Answers
from castling_jax.training.config import FIELDS
from castling_jax.training.config_files import run_config
from castling_jax.training.console import of_classes
from castling_jax.training.evaluate import configured_evaluator, evaluate_weights
from castling_jax.training.setup import held_out_split, load_split
from castling_jax.training.sharding import check_batch, make_mesh, place, state_shardings, whole_over_fsdp
from castling_jax.training.summary import describe_each_weights, describe_measures

EVALUATIONS = "evaluation"  # the folder of evaluations in a run's folder
GROUPS = ("dataset", "evaluation")  # groups of fields that an evaluation may change
WITHOUT_EFFECT = ("dataset.train_split", "dataset.accept_changes", "evaluation.every_epochs")  # but not these of them
CLASSES_SHOWN = 20  # with more classes, only the worst are printed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's evaluation on a split.

    Attributes:
      figures: the figures of `evaluate_weights` and of `what_is_evaluated`.
      answers: the exported weights' answers to each image.
      classes: names of the classes.
    """

    figures: dict[str, Any]
    answers: Answers
    classes: list[str]

    @property
    def by_class(self) -> dict[str, dict[str, Any]]:
        """The figures of each class, from the task's `Answers.by_class`."""
        return self.answers.by_class(self.classes)

    def folder(self, run: epath.PathLike) -> epath.Path:
        """Where `write` puts this evaluation: RUN/evaluation/DATASET-SPLIT-STEP."""
        name = self.figures["dataset"]
        path = path_of(name)
        name = name if path is None else epath.Path(path).name
        stem = f"{name[:80]}-{self.figures['split'][:80]}-{self.figures['step']}"
        return epath.Path(run) / EVALUATIONS / re.sub(r"[^\w.-]", "_", stem)

    def write(self, run: epath.PathLike) -> list[epath.Path]:
        """Writes this evaluation into `folder(run)`, over an earlier one of the same name.

        figures.json holds the figures, also those of each class. The other files come from the task's `Answers.files`.

        Returns:
          The paths of the files.

        Raises:
          InputError: the files cannot be written.
        """
        folder = self.folder(run)
        figures = json.dumps(self.figures | {"classes": self.by_class}, indent=2).encode()
        files = {"figures.json": figures, **self.answers.files(self.classes)}
        with refusing(OSError, f"the evaluation cannot be written into '{folder}'"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                write_atomically(folder / name, data)
        return [folder / name for name in files]

    def __str__(self) -> str:
        figures = self.figures
        left_out = f" ({figures['eval_corrupt']:,} corrupt ones left out)" if figures["eval_corrupt"] else ""
        train_form, inference_form = describe_measures(figures)
        loss = f", loss {figures['eval_loss']:.4f} nats" if "eval_loss" in figures else ""
        both = "".join(f"{name}: {', '.join(shares)}\n" for name, *shares in describe_each_weights(figures))
        return (
            f"step {figures['step']:,}, mask {figures['mask_kind']} {figures['mask_threshold']:g}\n"
            f"  {figures['dataset']}, split {figures['split']}: {figures['eval_images']:,} images"
            f"{of_classes(len(self.classes))}{left_out}\n"
            f"  training form   {train_form}\n"
            f"  inference form  {inference_form}{loss}\n"
            f"{both}"
            f"  largest difference between the two forms' outputs: {figures['max_difference']:.1e}\n"
            f"{self._describe_classes()}"
        )

    def _describe_classes(self) -> str:
        """A line for each class or, if there are many, for the worst CLASSES_SHOWN."""
        measure = measures_of(self.figures)[0]
        rows = [(name, row["images"], row[measure.name]) for name, row in self.by_class.items()]
        rows = [row for row in rows if row[2] is not None]  # a class that no image has may still have been answered
        if not rows:
            return ""
        title = f"  {measure.name} of each class, inference form:"
        if len(rows) > CLASSES_SHOWN:
            title = f"  the {CLASSES_SHOWN} classes of the lowest {measure.name}, inference form:"
            rows = sorted(rows, key=lambda row: row[2])[:CLASSES_SHOWN]
        cells = [(printable(name), f"{measure.text(figure):>8s} of {images:,}") for name, images, figure in rows]
        lines = aligned(cells, "l", indent="    ")
        return "\n".join([title, *lines, ""])


def evaluate_checkpoint(
    path: str | os.PathLike, mesh_sizes: Mapping[str, int], changes: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluates a checkpoint with its run's configuration, on the split of the run's summary or on other data.

    Args:
      path: a run or one of its checkpoints, as `read` takes it.
      mesh_sizes: sizes of the mesh's axes, as `make_mesh` takes them; the run may have had another mesh.
      changes: fields dataset.NAME and evaluation.NAME -> values that replace the run's. dataset.test_split or
        dataset.eval_split, but not both, names the split.

    Raises:
      InputError: `path` is no checkpoint or cannot be read, the mesh does not fit, a change names another field or a
        wrong value, or the data's classes are not the run's.
    """
    changes = dict(changes or {})
    check_changes(changes)
    mesh = make_mesh(mesh_sizes)
    checkpoint = read(path)
    model, threshold = checkpoint.model, checkpoint.mask_threshold
    if model is None or checkpoint.config is None or threshold is None:
        raise InputError(f"'{path}' is neither a run's folder with checkpoints nor one of its {CHECKPOINTS}/STEP.")
    no_effect = unused_fields(model)
    if unused := [f"config.{name}" for name in changes if name in no_effect]:
        raise InputError(f"the run's {model.spec.name} does not use {', '.join(unused)}: leave it out.")
    config = _changed(run_config(checkpoint.config), changes)
    # A run that keeps averages reports raw and averaged weights; `checkpoint` has the ones that it exports.
    checkpoints = [checkpoint]
    if config.train.ema_decay is not None:
        checkpoints.append(read(checkpoint.path, ema=not checkpoint.averaged))
    check_batch("config.evaluation.batch_size", config.evaluation.batch_size, mesh)
    dataset = _load(config, checkpoint)
    shardings = whole_over_fsdp(state_shardings(checkpoint.variables, mesh))
    exported = exported_weights(config)
    with jax.set_mesh(mesh):
        evaluate = configured_evaluator(config, model, dataset, mesh)
        weights = {"averaged" if one.averaged else "raw": place(one.variables, shardings) for one in checkpoints}
        figures, answers = evaluate_weights(evaluate, weights, threshold, exported=exported)
    assert checkpoint.step is not None  # checkpoints always have a step
    about = what_is_evaluated(config, task_of(model).name, checkpoint.step, threshold)
    return Evaluation(about | figures, answers, list(dataset.classes))


def check_changes(changes: Mapping[str, Any]) -> None:
    """Refuses fields that have no effect on an evaluation, and values that are not allowed.

    Raises:
      InputError: names the fields, or the value and what is allowed.
    """
    heeded = [name for name in FIELDS if name.split(".")[0] in GROUPS and name not in WITHOUT_EFFECT]
    if wrong := [name for name in changes if name not in heeded]:
        raise InputError(
            f"an evaluation takes the run as it was configured, and does not heed {', '.join(wrong)}: of the "
            f"configuration, only {', '.join(heeded)} and mesh may be given."
        )
    if {"dataset.eval_split", "dataset.test_split"} <= changes.keys():
        raise InputError("dataset.eval_split and dataset.test_split both name the split to evaluate: give one of them.")
    for name, value in changes.items():
        FIELDS[name].check(f"config.{name}", value)


def what_is_evaluated(config: ConfigDict, task: str, step: int, threshold: float) -> dict[str, Any]:
    """The figures that identify an evaluation: the weights, the data and the mask."""
    return {
        "task": task,
        "dataset": config.dataset.name,
        "split": summary_split(config),
        "step": step,
        "mask_kind": config.mask.kind,
        "mask_threshold": threshold,
        "exported": exported_weights(config),
    }


def summary_split(config: ConfigDict) -> str:
    """The split of a run's summary: the test split if there is one, else the held-out split."""
    return config.dataset.eval_split if config.dataset.test_split is None else config.dataset.test_split


def run_of(path: str | os.PathLike) -> epath.Path:
    """The run's folder of a path that `evaluate_checkpoint` takes: RUN, or RUN/checkpoints/STEP."""
    folder = absolute(epath.Path(path))
    return folder.parent.parent if folder.name.isdigit() and folder.parent.name == CHECKPOINTS else epath.Path(path)


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    # The user's split counts, whichever field names it; summary_split would prefer the run's test split.
    if "dataset.eval_split" in changes:
        changes = changes | {"dataset.test_split": None}
    with config.ignore_type():
        for name, value in changes.items():
            group, field = name.split(".")
            config[group][field] = value
    config.dataset.eval_split = held_out_split(config.dataset)
    return config


def _load(config: ConfigDict, checkpoint: Weights) -> Dataset:
    """Loads the split to evaluate; its classes must be the run's, if the run's task reads labels."""
    model = checkpoint.model
    assert model is not None
    dataset = load_split(config, summary_split(config), checkpoint.classes)
    check_dataset(model, dataset)
    if task_of(model).annotation is None:
        return dataset
    remedy = "choose data of these classes by --config.dataset.name"
    if checkpoint.classes is not None:
        check_same_classes(checkpoint.classes, list(dataset.classes), remedy=remedy)
    elif dataset.num_classes != model.spec.num_classes:
        raise InputError(
            f"the data has {dataset.num_classes:,} classes, and the run's model {model.spec.num_classes:,}: {remedy}."
        )
    return dataset
