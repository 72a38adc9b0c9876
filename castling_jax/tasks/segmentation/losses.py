"""The losses of segmentation: sums over each image's pixels that have a class."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from castling_jax.data.masks import IGNORED

SMOOTHING = 1.0  # added to both sides of dice's fraction, so that a class that is nowhere has no loss


def pixel_cross_entropy(
    logits: Float[Array, "batch height width classes"], labels: Int[Array, "batch height width"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """(sum of each image's cross entropies in nats, number of its pixels that count).

    Args:
      logits: each pixel's logits.
      labels: each pixel's class; pixels whose label is IGNORED do not count.
    """
    valid = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return jnp.sum(losses * valid, axis=(1, 2)), jnp.sum(valid, axis=(1, 2), dtype=jnp.float32)


def soft_dice_loss(
    logits: Float[Array, "batch height width classes"], labels: Int[Array, "batch height width"]
) -> Float[Array, "batch"]:
    """Each image's dice loss (Milletari et al., arXiv 1606.04797, whose denominator has squares): from 0 to 1, the mean
    over the classes of

    1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), where p is a pixel's probability of the class, t is 1 in the pixels of
    the class and else 0, and the sums are over the pixels that have a class.
    """
    valid = labels != IGNORED
    probabilities = jax.nn.softmax(logits) * valid[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1])  # IGNORED is no class: its row is zero
    both, one, other = (jnp.sum(pixels, axis=(1, 2)) for pixels in (probabilities * truth, probabilities, truth))
    return jnp.mean(1 - (2 * both + SMOOTHING) / (one + other + SMOOTHING), axis=-1)
