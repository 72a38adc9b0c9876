"""Exact evaluation of both forms in one pass."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.convert.inference import to_inference
from castling_jax.convert.run_folder import exported_weights
from castling_jax.convert.weights import read
from castling_jax.data.fingerprint import check_same_classes
from castling_jax.data.loader import EvalTransform, evaluation_batches
from castling_jax.data.sources import Dataset, load_dataset
from castling_jax.data.transforms import eval_transform
from castling_jax.errors import InputError
from castling_jax.models.backbone import Backbone
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, get_variables
from castling_jax.training.config import image_options
from castling_jax.training.config_files import run_config
from castling_jax.training.sharding import (
    check_batch,
    make_mesh,
    place,
    process_rows,
    replicated,
    shard_batch,
    state_shardings,
    whole_over_fsdp,
)

Evaluator = Callable[[Variables, float], dict[str, float]]


def make_evaluator(
    model: Backbone,
    dataset: Dataset,
    *,
    transform: EvalTransform,
    batch_size: int,
    mesh: Mesh,
    workers: int = 0,
    max_corrupt_share: float = 0.0,
) -> Evaluator:
    """Builds (variables, threshold) -> figures over the whole dataset, every example counted once.

    Corrupt images are left out, and more of them than max_corrupt_share are an InputError. The dataset, its transform
    and the workers are as `evaluation_batches` takes them.

    The figures: accuracy_train_form, accuracy_inference_form (shares), eval_loss (cross entropy of the inference form
    in nats, without smoothing), max_difference (largest absolute difference between the two forms' logits). Where batch
    norm is folded that difference is of both forms computed in float32: folded kernels are rounded anew, which in
    bfloat16 would be all that it shows.
    """
    forms = model, _with(model, form="inference")
    exact_forms = forms
    if "batch_stats" in get_variables(model):
        exact_forms = _with(model, dtype="float32"), _with(model, form="inference", dtype="float32")

    def both_logits(
        forms: tuple[Backbone, Backbone], variables: Variables, images: jax.Array, threshold: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        train_form, inference_form = forms
        return (
            apply(train_form, variables, images, mask_threshold=threshold),
            apply(inference_form, to_inference(variables), images),
        )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def evaluate_batch(
        totals: dict[str, jax.Array], variables: Variables, batch: dict[str, jax.Array], threshold: jax.Array
    ) -> dict[str, jax.Array]:
        train_logits, logits = compared = both_logits(forms, variables, batch["image"], threshold)
        if exact_forms is not forms:
            with jax.default_matmul_precision("highest"):
                compared = both_logits(exact_forms, variables, batch["image"], threshold)
        weight, labels = batch["weight"], batch["label"]
        difference = jnp.max(jnp.abs(compared[0] - compared[1]), axis=-1) * weight
        return {
            "accuracy_train_form": totals["accuracy_train_form"]
            + jnp.sum(weight * (train_logits.argmax(-1) == labels)),
            "accuracy_inference_form": totals["accuracy_inference_form"]
            + jnp.sum(weight * (logits.argmax(-1) == labels)),
            "eval_loss": totals["eval_loss"]
            + jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, labels)),
            "examples": totals["examples"] + jnp.sum(weight),
            "max_difference": jnp.maximum(totals["max_difference"], jnp.max(difference)),
        }

    def evaluate(variables: Variables, threshold: float) -> dict[str, float]:
        names = ("accuracy_train_form", "accuracy_inference_form", "eval_loss", "max_difference")
        totals = {name: jnp.zeros((), jnp.float32) for name in (*names, "examples")}
        # Gathered once, not for every batch.
        variables = jax.device_put(variables, whole_over_fsdp(state_shardings(variables, mesh)))
        for batch in evaluation_batches(
            dataset,
            batch_size=batch_size,
            transform=transform,
            rows=process_rows(batch_size, mesh),
            workers=workers,
            max_corrupt_share=max_corrupt_share,
        ):
            global_batch = shard_batch(batch, mesh, batch_size=batch_size)
            totals = evaluate_batch(totals, variables, global_batch, jnp.float32(threshold))
        examples = float(totals["examples"])
        return {name: float(totals[name]) / (1 if name == "max_difference" else examples) for name in names}

    return evaluate


def evaluate_weights(
    evaluate: Evaluator, weights: Mapping[str, Variables], threshold: float, *, exported: str
) -> dict[str, float]:
    """The exported weights' figures; and where raw and averaged ones are kept, both sets', as raw_NAME, averaged_NAME.

    Args:
      evaluate: as `make_evaluator` builds it.
      weights: as `TrainState.weights` has them.
      threshold: of the mask.
      exported: which of them the run exports.
    """
    found = {kind: evaluate(variables, threshold) for kind, variables in weights.items()}
    both = {f"{kind}_{name}": value for kind, figures in found.items() for name, value in figures.items()}
    return found[exported] | (both if len(found) > 1 else {})


def _with(model: Backbone, **changes: str) -> Backbone:
    return abstract_model(**model.spec.arguments(**changes))


def configured_evaluator(config: ConfigDict, model: Backbone, dataset: Dataset, mesh: Mesh) -> Evaluator:
    """`make_evaluator` with all that a configuration says of it."""
    return make_evaluator(
        model,
        dataset,
        transform=eval_transform(**image_options(config, model.spec.image_size)),
        batch_size=config.evaluation.batch_size,
        mesh=mesh,
        workers=config.dataset.workers,
        max_corrupt_share=config.dataset.max_corrupt_share,
    )


def evaluate_checkpoint(path: str | os.PathLike, mesh_sizes: Mapping[str, int]) -> dict[str, Any]:
    """The figures of `evaluate_weights` of a checkpoint, on its run's held-out split; step, mask, exported.

    Args:
      path: of a run or one of its checkpoints, as `read` takes it.
      mesh_sizes: as `make_mesh` takes them; the run may have had another mesh.

    Raises:
      InputError: the checkpoint cannot be read or is none, the mesh does not fit, or the data has other classes than
        the run's.
    """
    mesh = make_mesh(mesh_sizes)
    checkpoint = read(path)
    model, threshold = checkpoint.model, checkpoint.mask_threshold
    if model is None or checkpoint.config is None or threshold is None:
        raise InputError(f"'{path}' is neither a run's folder with checkpoints nor one of its {CHECKPOINTS}/STEP.")
    config = run_config(checkpoint.config)
    checkpoints = [checkpoint]
    if config.train.ema_decay is not None:
        checkpoints.append(read(checkpoint.path, ema=not checkpoint.averaged))
    check_batch("config.evaluation.batch_size", config.evaluation.batch_size, mesh)
    dataset = load_dataset(config.dataset.name, config.dataset.eval_split, data_dir=config.dataset.data_dir)
    if checkpoint.classes is not None:
        check_same_classes(checkpoint.classes, list(dataset.classes))
    shardings = whole_over_fsdp(state_shardings(checkpoint.variables, mesh))
    exported = exported_weights(config)
    with jax.set_mesh(mesh):
        evaluate = configured_evaluator(config, model, dataset, mesh)
        weights = {"averaged" if one.averaged else "raw": place(one.variables, shardings) for one in checkpoints}
        figures = evaluate_weights(evaluate, weights, threshold, exported=exported)
    mask = {"mask_kind": config.mask.kind, "mask_threshold": threshold}
    return {"step": checkpoint.step, **mask, "exported": exported, **figures}
