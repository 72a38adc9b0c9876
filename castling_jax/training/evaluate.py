"""Evaluates both forms exactly in one pass: every example counts once, on any number of devices and processes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from castling_jax.convert.inference import to_inference
from castling_jax.convert.run_folder import preprocessing_of
from castling_jax.data.loader import EvalTransform, evaluation_batches
from castling_jax.data.sources import Dataset
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, get_variables
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.images import finish_images
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.task import Answers, Batch, Task, seen_images
from castling_jax.training.sharding import (
    process_rows,
    replicated,
    shard_batch,
    state_shardings,
    whole_over_fsdp,
)

Evaluator = Callable[[Variables, float], Answers]


def make_evaluator(
    model: Model,
    dataset: Dataset,
    task: Task,
    *,
    transform: EvalTransform,
    batch_size: int,
    mesh: Mesh,
    preprocessing: Preprocessing | None = None,
    workers: int = 0,
    max_corrupt_share: float = 0.0,
) -> Evaluator:
    """Builds (variables, threshold) -> answers to the whole dataset; all processes get all answers.

    Corrupt images are left out, and more of them than max_corrupt_share raise an InputError. The dataset, its transform
    and the workers are the same as for `evaluation_batches`. `preprocessing` is as in `make_train_step`.

    For models with batch norm, the difference between the two forms is computed in float32: folding rounds the kernels
    anew, and in bfloat16 the difference would show only that.
    """
    forms = exact_forms = {"train_form": model, "inference_form": _with(model, form="inference")}
    if "batch_stats" in get_variables(model):
        exact_forms = {name: _with(form, dtype="float32") for name, form in forms.items()}

    def outputs_of(
        forms: Mapping[str, Model], variables: Variables, images: jax.Array, threshold: jax.Array
    ) -> dict[str, Any]:
        return {
            "train_form": apply(forms["train_form"], variables, images, mask_threshold=threshold),
            "inference_form": apply(forms["inference_form"], to_inference(variables), images),
        }

    # Replicated, because every process collects all answers; they are a few numbers for each image.
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def answer_batch(variables: Variables, batch: Batch, threshold: jax.Array) -> Batch:
        batch = finish_images(batch, preprocessing)
        images = seen_images(batch)
        outputs = exact = outputs_of(forms, variables, images, threshold)
        if exact_forms is not forms:
            with jax.default_matmul_precision("highest"):  # a TPU would multiply float32 numbers in bfloat16
                exact = outputs_of(exact_forms, variables, images, threshold)
        return {"weight": batch["weight"]} | task.answer(outputs, exact, batch)

    def evaluate(variables: Variables, threshold: float) -> Answers:
        # Gathered over fsdp once, not for every batch.
        variables = jax.device_put(variables, whole_over_fsdp(state_shardings(variables, mesh)))
        # The answers stay on the devices until the end: fetching each batch's would wait for it before the next starts.
        parts = [
            answer_batch(variables, shard_batch(batch, mesh, batch_size=batch_size), jnp.float32(threshold))
            for batch in evaluation_batches(
                dataset,
                batch_size=batch_size,
                transform=transform,
                rows=process_rows(batch_size, mesh),
                workers=workers,
                max_corrupt_share=max_corrupt_share,
            )
        ]
        columns = jax.tree.map(lambda *arrays: np.concatenate(arrays), *jax.device_get(parts))
        (image,) = np.nonzero(columns.pop("weight"))  # without the last batch's padding and without corrupt images
        answers = {name: array[image] for name, array in columns.items()}
        return task.collect({"image": image, **answers}, dataset, corrupt=len(dataset) - len(image))

    return evaluate


def evaluate_weights(
    evaluate: Evaluator, weights: Mapping[str, Variables], threshold: float, *, exported: str
) -> tuple[dict[str, float], Answers]:
    """Evaluates all weights; returns the exported weights' (figures, answers).

    If there are raw and averaged weights, the figures also contain those of both, as raw_NAME and averaged_NAME.

    Args:
      evaluate: the evaluator from `make_evaluator`.
      weights: "raw", and "averaged" if kept -> variables, from `TrainState.weights`.
      threshold: the mask threshold.
      exported: the key of the weights that the run exports.
    """
    answers = {kind: evaluate(variables, threshold) for kind, variables in weights.items()}
    figures = {kind: answer.figures() for kind, answer in answers.items()}
    both = {f"{kind}_{name}": value for kind, values in figures.items() for name, value in values.items()}
    return figures[exported] | (both if len(figures) > 1 else {}), answers[exported]


def _with(model: Model, **changes: str) -> Model:
    return abstract_model(**model.spec.arguments(**changes))


def configured_evaluator(config: ConfigDict, model: Model, dataset: Dataset, mesh: Mesh) -> Evaluator:
    """Calls `make_evaluator` with the options of a configuration."""
    task = task_of(model).from_config(config, model)
    preprocessing = preprocessing_of(config, model.spec.image_size)
    return make_evaluator(
        model,
        dataset,
        task,
        transform=task.split_transform(preprocessing, dataset),
        preprocessing=preprocessing,
        batch_size=config.evaluation.batch_size,
        mesh=mesh,
        workers=config.dataset.workers,
        max_corrupt_share=config.dataset.max_corrupt_share,
    )
