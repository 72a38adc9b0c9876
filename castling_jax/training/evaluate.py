"""Exact evaluation of both forms in one pass."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from castling_jax.convert.inference import to_inference
from castling_jax.convert.run_folder import preprocessing_of
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.sources import Dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, get_variables
from castling_jax.training.answers import TOP, Answers
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
    *,
    transform: EvalTransform,
    batch_size: int,
    mesh: Mesh,
    workers: int = 0,
    max_corrupt_share: float = 0.0,
) -> Evaluator:
    """Builds (variables, threshold) -> answers to the whole dataset, every example once; all processes have them all.

    Corrupt images are left out, and more of them than max_corrupt_share are an InputError. The dataset, its transform
    and the workers are as `evaluation_batches` takes them.

    Where batch norm is folded, the difference between the two forms' logits is that of both computed in float32: folded
    kernels are rounded anew, which in bfloat16 would be all that the difference shows.
    """
    forms = model, _with(model, form="inference")
    exact_forms = forms
    if "batch_stats" in get_variables(model):
        exact_forms = _with(model, dtype="float32"), _with(model, form="inference", dtype="float32")

    def both_logits(
        forms: tuple[Model, Model], variables: Variables, images: jax.Array, threshold: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        train_form, inference_form = forms
        return (
            apply(train_form, variables, images, mask_threshold=threshold),
            apply(inference_form, to_inference(variables), images),
        )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def answer_batch(variables: Variables, batch: dict[str, jax.Array], threshold: jax.Array) -> dict[str, jax.Array]:
        train_logits, logits = compared = both_logits(forms, variables, batch["image"], threshold)
        if exact_forms is not forms:
            with jax.default_matmul_precision("highest"):
                compared = both_logits(exact_forms, variables, batch["image"], threshold)
        labels = batch["label"]
        return {
            "weight": batch["weight"],
            "label": labels,
            "train_form": train_logits.argmax(-1),
            "inference_form": logits.argmax(-1),
            "top_train_form": _is_among_the_first(labels, train_logits),
            "top_inference_form": _is_among_the_first(labels, logits),
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "difference": jnp.max(jnp.abs(compared[0] - compared[1]), axis=-1),
        }

    def evaluate(variables: Variables, threshold: float) -> Answers:
        # Gathered once, not for every batch.
        variables = jax.device_put(variables, whole_over_fsdp(state_shardings(variables, mesh)))
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
        found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *jax.device_get(parts))
        (image,) = np.nonzero(found.pop("weight"))  # neither the last batch's padding nor what is corrupt
        answers = {name: array[image] for name, array in found.items()}
        return Answers(model.spec.num_classes, image, **answers, corrupt=len(dataset) - len(image))

    return evaluate


def _is_among_the_first(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Whether each label is among the TOP largest logits, or all where there are no more."""
    _, first = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return (first == labels[:, None]).any(-1)


def evaluate_weights(
    evaluate: Evaluator, weights: Mapping[str, Variables], threshold: float, *, exported: str
) -> tuple[dict[str, float], Answers]:
    """The exported weights' figures and answers.

    Where raw and averaged weights are kept, both sets' figures are there too, as raw_NAME and averaged_NAME.

    Args:
      evaluate: as `make_evaluator` builds it.
      weights: as `TrainState.weights` has them.
      threshold: of the mask.
      exported: which of them the run exports.
    """
    answers = {kind: evaluate(variables, threshold) for kind, variables in weights.items()}
    found = {kind: answer.figures() for kind, answer in answers.items()}
    both = {f"{kind}_{name}": value for kind, figures in found.items() for name, value in figures.items()}
    return found[exported] | (both if len(found) > 1 else {}), answers[exported]


def _with(model: Model, **changes: str) -> Model:
    return abstract_model(**model.spec.arguments(**changes))


def configured_evaluator(config: ConfigDict, model: Model, dataset: Dataset, mesh: Mesh) -> Evaluator:
    """`make_evaluator` with all that a configuration says of it."""
    return make_evaluator(
        model,
        dataset,
        transform=EvalTransform(preprocessing_of(config, model.spec.image_size)),
        batch_size=config.evaluation.batch_size,
        mesh=mesh,
        workers=config.dataset.workers,
        max_corrupt_share=config.dataset.max_corrupt_share,
    )
