"""Initial values against jax.nn.initializers, bit by bit: a seed must go on giving the same weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.models.initializers import SHARED_SIZE, normal, scaled_uniform, uniform

KEY = jax.random.key(3)
# A scalar's worth, an odd size, a window, and one that is too large for the program that small arrays share.
SHAPES = [(1, 1), (7, 33), (3, 3, 5, 12), (16, 16, 3, 192), (300, 401)]


def assert_same(own, jaxs, shape, dtype):
    values = own(KEY, shape, dtype)
    assert values.dtype == dtype
    expected = np.float32(jaxs(KEY, shape, dtype))
    # The draws are the same; where JAX's newest version scales them in the same program, it rounds once less.
    np.testing.assert_allclose(np.float32(values), expected, rtol=0, atol=jnp.finfo(dtype).eps * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_jaxs(shape, dtype):
    assert_same(normal(0.02), jax.nn.initializers.normal(0.02), shape, dtype)
    assert_same(scaled_uniform(1.0, "fan_avg"), jax.nn.initializers.glorot_uniform(), shape, dtype)
    lecun = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    assert_same(scaled_uniform(1 / 3, "fan_in"), lecun, shape, dtype)
    assert_same(
        uniform(0.3), lambda *arguments: jax.random.uniform(*arguments, minval=-0.3, maxval=0.3), (shape[-1],), dtype
    )


def test_a_patchs_pixels_can_count_as_inputs():
    own = scaled_uniform(1.0, "fan_avg", in_axes=(0, 1, 2))
    assert_same(own, jax.nn.initializers.glorot_uniform(in_axis=(0, 1, 2)), (4, 4, 3, 24), jnp.float32)


def test_small_arrays_share_one_program(monkeypatch):
    drawn = []
    draw = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: drawn.append(shape) or draw(key, shape, dtype))
    for shape in SHAPES:
        normal(1.0)(KEY, shape, jnp.float32)
    small = sum(math.prod(shape) <= SHARED_SIZE for shape in SHAPES)
    assert drawn == [(SHARED_SIZE,)] * small + [(math.prod(shape),) for shape in SHAPES[small:]]
