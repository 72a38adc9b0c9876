import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.norms import l2_normalize
from tests.ops import reference, rounding

DIM = 24


def vectors(norm, dtype=jnp.float32):
    (x,), _ = rounding.draw(0, jnp.float32, (50, DIM))
    x = (norm * x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    return x, np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm", [1e-9, 1e-4, 1.0, 1e4, 1e15, 1e18])
def test_values_and_gradients_for_norms_far_apart(norm, dtype):
    x, wide = vectors(norm, dtype)
    (cotangent,), (wide_cotangent,) = rounding.draw(1, jnp.float32, x.shape)
    normal, pullback = jax.vjp(l2_normalize, x)
    expected = reference.normalize(wide)
    # A sum of squares, half of whose relative error counts, a root and a product.
    bound = (DIM / 2 + 4) * rounding.FLOAT32
    rounding.assert_within(normal, expected, bound * np.abs(expected))
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    along = np.sum(wide_cotangent * expected, axis=-1, keepdims=True)
    gradient = (wide_cotangent - along * expected) / length
    # The two terms, each from sums of DIM products and some roundings more, and the result in x's dtype.
    sizes = (np.abs(wide_cotangent) + np.linalg.norm(wide_cotangent, axis=-1, keepdims=True)) / length
    bound = 4 * DIM * rounding.FLOAT32 * sizes + rounding.unit(dtype) * np.abs(gradient)
    rounding.assert_within(pullback(cotangent)[0], gradient, 1.01 * bound)


# A vector of norm 1e-30 has squares of zero in float32.
@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-19, 1e-11])
def test_a_zero_vector_normalises_to_zero_and_passes_no_gradient(norm):
    x, wide = vectors(norm)
    normal, pullback = jax.vjp(l2_normalize, x)
    # What is not quite zero is divided by 1e-10; a few roundings, and numbers that are too small for float32.
    np.testing.assert_allclose(normal, wide / 1e-10, rtol=4 * rounding.FLOAT32, atol=1e-27)
    assert not jnp.any(pullback(jnp.ones_like(x))[0])
    _, tangent = jax.jvp(l2_normalize, (x,), (jnp.ones_like(x),))
    assert not jnp.any(tangent)


@pytest.mark.slow
def test_second_derivatives_are_finite_and_zero_at_zero():
    x = jnp.zeros(DIM)
    hessian = jax.hessian(lambda x: jnp.sum(jnp.sin(l2_normalize(x) + 1)))
    assert not jnp.any(hessian(x))
    assert jnp.isfinite(hessian(vectors(1.0)[0][0])).all()


def test_gradients_match_differences():
    rounding.assert_gradients_match_differences(l2_normalize, np.random.default_rng(2).normal(size=(5, DIM)))


def test_nan_is_seen():
    x, _ = vectors(1.0)
    assert jnp.isnan(l2_normalize(x.at[3, 5].set(jnp.nan))[3]).all()
