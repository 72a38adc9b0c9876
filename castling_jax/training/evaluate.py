"""Exact evaluation of both forms in one pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from castling_jax.convert.inference import to_inference
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.sources import Dataset
from castling_jax.models.backbone import Backbone
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply
from castling_jax.training.losses import cross_entropy
from castling_jax.training.sharding import shard_batch

Evaluator = Callable[[Variables, float], dict[str, float]]


def make_evaluator(model: Backbone, dataset: Dataset, *, batch_size: int, mesh: Mesh) -> Evaluator:
    """Builds (variables, threshold) -> figures over the whole dataset, every example counted once.

    The figures: accuracy_train_form, accuracy_inference_form (shares), eval_loss (cross entropy of the inference form
    in nats, without smoothing), max_difference (largest absolute difference between the two forms' logits).
    """
    inference_model = abstract_model(**model.spec.arguments(form="inference"))

    @jax.jit
    def evaluate_batch(
        totals: dict[str, jax.Array], variables: Variables, batch: dict[str, jax.Array], threshold: jax.Array
    ) -> dict[str, jax.Array]:
        train_logits = apply(model, variables, batch["image"], mask_threshold=threshold)
        logits = apply(inference_model, to_inference(variables), batch["image"])
        weight, labels = batch["weight"], batch["label"]
        difference = jnp.max(jnp.abs(train_logits - logits), axis=-1) * weight
        return {
            "accuracy_train_form": totals["accuracy_train_form"]
            + jnp.sum(weight * (train_logits.argmax(-1) == labels)),
            "accuracy_inference_form": totals["accuracy_inference_form"]
            + jnp.sum(weight * (logits.argmax(-1) == labels)),
            "eval_loss": totals["eval_loss"] + jnp.sum(weight * cross_entropy(logits, labels)),
            "max_difference": jnp.maximum(totals["max_difference"], jnp.max(difference)),
        }

    def evaluate(variables: Variables, threshold: float) -> dict[str, float]:
        names = ("accuracy_train_form", "accuracy_inference_form", "eval_loss", "max_difference")
        totals = {name: jnp.zeros((), jnp.float32) for name in names}
        batches = evaluation_batches(
            dataset, batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        )
        for batch in batches:
            totals = evaluate_batch(totals, variables, shard_batch(batch, mesh), jnp.float32(threshold))
        return {
            name: float(total) / (1 if name == "max_difference" else len(dataset)) for name, total in totals.items()
        }

    return evaluate
