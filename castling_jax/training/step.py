"""The training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import forward_train
from castling_jax.ops.checks import is_known_empty
from castling_jax.training.losses import cross_entropy
from castling_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model: Backbone,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float,
) -> Callable[[TrainState, dict[str, jax.Array], float], tuple[TrainState, Metrics]]:
    """Builds (state, batch, threshold) -> (state, {"loss", "mask_density" [layers]}); the state is donated.

    The threshold is traced below 1, so that a schedule does not recompile the step; from 1 on the mask is empty and
    the step is another program, compiled without the softmax branch. A threshold that is traced already is below 1.
    """

    def step(
        state: TrainState, batch: dict[str, jax.Array], threshold: Float[Array, ""] | float
    ) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, densities, batch_stats = forward_train(
                model,
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                mask_threshold=threshold,
                key=jax.random.fold_in(state.key, state.step),
            )
            loss = jnp.mean(cross_entropy(logits, batch["label"], label_smoothing=label_smoothing))
            return loss, (densities, batch_stats)

        (loss, (densities, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
            key=state.key,
        )
        return state, {"loss": loss, "mask_density": densities}

    with_branch = jax.jit(step, donate_argnums=0)
    # A number known while tracing, not an argument: the operations see that the mask is empty.
    without_branch = jax.jit(functools.partial(step, threshold=1.0), donate_argnums=0)

    def train_step(state: TrainState, batch: dict[str, jax.Array], threshold: float) -> tuple[TrainState, Metrics]:
        if is_known_empty(threshold):
            return without_branch(state, batch)
        return with_branch(state, batch, jnp.float32(threshold))

    return train_step
