"""The losses pixel by pixel in float64, and their gradients as finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.data.masks import IGNORED
from castling_jax.tasks.segmentation.losses import pixel_cross_entropy, soft_dice_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((3, 6, 7, 4)) * 2
LABELS = RNG.integers(0, 4, (3, 6, 7)).astype(np.int32)
LABELS[RNG.random(LABELS.shape) < 0.3] = IGNORED
LABELS[2] = IGNORED  # an image in which no pixel has a class


def each_pixel(logits, labels):
    """Yields (image, class, probabilities) of the pixels that have a class."""
    for image, row, column in np.argwhere(labels != IGNORED):
        exponents = np.exp(logits[image, row, column] - logits[image, row, column].max())
        yield image, labels[image, row, column], exponents / exponents.sum()


def reference_cross_entropy(logits, labels):
    totals = np.zeros(len(logits))
    for image, label, probabilities in each_pixel(logits, labels):
        totals[image] -= np.log(probabilities[label])
    return totals


def reference_dice(logits, labels):
    both, one, other = np.zeros((3, len(logits), logits.shape[-1]))
    for image, label, probabilities in each_pixel(logits, labels):
        both[image, label] += probabilities[label]
        one[image] += probabilities
        other[image, label] += 1
    return np.mean(1 - (2 * both + 1) / (one + other + 1), axis=-1)


def test_cross_entropy_is_summed_over_the_pixels_that_have_a_class():
    total, count = pixel_cross_entropy(jnp.float32(LOGITS), jnp.asarray(LABELS))
    # Sums of 30 float32 numbers.
    np.testing.assert_allclose(total, reference_cross_entropy(LOGITS, LABELS), rtol=2e-6)
    np.testing.assert_array_equal(count, (LABELS != IGNORED).sum((1, 2)))
    assert total[2] == count[2] == 0


def test_dice_is_over_the_pixels_that_have_a_class():
    found = soft_dice_loss(jnp.float32(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(found, reference_dice(LOGITS, LABELS), rtol=0, atol=1e-6)
    assert found[2] == 0
    certain = 50 * jax.nn.one_hot(LABELS, 4)
    np.testing.assert_allclose(soft_dice_loss(certain, jnp.asarray(LABELS)), 0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (lambda logits, labels: pixel_cross_entropy(logits, labels)[0], reference_cross_entropy),
        (soft_dice_loss, reference_dice),
    ],
)
def test_gradients_are_finite_differences(loss, reference):
    direction = RNG.standard_normal(LOGITS.shape)
    step = 1e-6
    slopes = (reference(LOGITS + step * direction, LABELS) - reference(LOGITS - step * direction, LABELS)) / (2 * step)
    found = jax.jvp(lambda x: loss(x, jnp.asarray(LABELS)), (jnp.float32(LOGITS),), (jnp.float32(direction),))[1]
    np.testing.assert_allclose(found, slopes, rtol=1e-5, atol=1e-6)
    # A pixel without a class passes no gradient, even where a logit is not finite.
    gradient = jax.grad(lambda x: loss(x, jnp.asarray(LABELS)).sum())(jnp.float32(LOGITS))
    assert not np.any(np.asarray(gradient)[LABELS == IGNORED])
