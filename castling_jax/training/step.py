"""The training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import forward_train
from castling_jax.ops.checks import is_known_empty
from castling_jax.training.losses import cross_entropy
from castling_jax.training.sharding import replicated, whole_over_fsdp
from castling_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: Backbone,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float,
    accumulate_steps: int = 1,
    shardings: Any = None,
) -> Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]:
    """Builds (state, batch, threshold) -> (state, metrics); the state is donated.

    The metrics are loss, gradient_norm (before any clip) and mask_density [layers].

    The threshold is traced below 1, so that a schedule does not recompile the step; from 1 on the mask is empty and
    the step is another program, compiled without the softmax branch. A threshold that is traced already is below 1.

    Args:
      model: in training form.
      optimizer: its state is in the TrainState.
      label_smoothing: share of each label that is spread over all classes.
      accumulate_steps: in so many parts the batch goes through the model, one after the other, for less memory. The
        gradients are those of the whole batch; batch norm's statistics are each part's.
      shardings: a TrainState of shardings, as the state has them; None leaves them to the compiler.
    """

    def place(tree: Any, where: Any) -> Any:
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, where)

    def gradients_of(params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, densities, new_stats = forward_train(
                model, {"params": params, "batch_stats": batch_stats}, batch["image"], mask_threshold=threshold, key=key
            )
            loss = jnp.mean(cross_entropy(logits, batch["label"], label_smoothing=label_smoothing))
            return loss, (densities, new_stats)

        (loss, (densities, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        gradients = place(gradients, shardings and shardings.params)
        return (gradients, {"loss": loss, "mask_density": densities}), batch_stats

    def accumulated(params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array) -> Any:
        def add_part(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            total, batch_stats = carry
            index, examples = part
            terms, batch_stats = gradients_of(params, batch_stats, examples, threshold, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, terms), batch_stats), None

        parts = jnp.arange(accumulate_steps), jax.tree.map(lambda rows: _interleaved(rows, accumulate_steps), batch)
        first = jax.tree.map(lambda part: part[0], parts[1])
        shapes, _ = jax.eval_shape(gradients_of, params, batch_stats, first, threshold, key)
        zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        (total, batch_stats), _ = jax.lax.scan(add_part, (zero, batch_stats), parts)
        return jax.tree.map(lambda leaf: leaf / accumulate_steps, total), batch_stats

    def step(state: TrainState, batch: Batch, threshold: ArrayLike) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        # Gathered once, here: left to itself, the compiler gathers activations too where that looks cheaper.
        params = place(state.params, shardings and whole_over_fsdp(shardings.params))
        run = gradients_of if accumulate_steps == 1 else accumulated
        (gradients, metrics), batch_stats = run(params, state.batch_stats, batch, threshold, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
            key=state.key,
        )
        return state, metrics | {"gradient_norm": optax.tree.norm(gradients)}

    # The state stays where it is, and the metrics are wanted everywhere.
    everywhere = None if shardings is None else replicated(shardings.step.mesh)
    out_shardings = None if shardings is None else (shardings, everywhere)
    with_branch = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    # A number known while tracing, not an argument: the operations see that the mask is empty.
    without_branch = jax.jit(functools.partial(step, threshold=1.0), donate_argnums=0, out_shardings=out_shardings)

    def train_step(state: TrainState, batch: Batch, threshold: float) -> tuple[TrainState, Metrics]:
        if is_known_empty(threshold):
            return without_branch(state, batch)
        return with_branch(state, batch, jnp.float32(threshold))

    return train_step


def _interleaved(rows: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] -> [parts, batch // parts, ...], every parts-th row together: each device splits its own rows."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)
