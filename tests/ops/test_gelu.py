"""Both GELUs against erf in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.gelu import gelu, tanh_gelu

X = np.concatenate([np.linspace(-12, 12, 200_001), [-1e4, 1e4]])
EXACT = np.array([0.5 * x * math.erfc(-x / math.sqrt(2)) for x in X])


# erf itself is good to some 1e-7 in float32, times |x| / 2 where it is not yet 1.
@pytest.mark.parametrize(("function", "tolerance"), [(gelu, 1e-6), (tanh_gelu, 1.3e-5)])
def test_distance_from_the_exact_gelu(function, tolerance):
    error = np.abs(np.asarray(function(jnp.float32(X)), np.float64) - EXACT)
    assert np.all(error <= tolerance + 1e-7 * np.abs(X))
