"""Loss functions."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], *, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Softmax cross entropy in nats, an example each; smoothing spreads its share evenly over all classes."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)
