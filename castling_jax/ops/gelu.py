"""The exact GELU, and one without erf for the kernels."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# atanh(erf(x / sqrt 2)) as an odd polynomial in x, fitted so that the largest error of `tanh_gelu` is smallest.
COEFFICIENTS = (0.79769012, 0.036730815, -2.5509931e-4, -8.6076363e-6)
LARGEST_SQUARE = 25.0  # at |x| = 5 tanh is 1 to six digits; beyond it the polynomial would turn back


def gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2, in x's dtype.

    jax.nn.gelu uses erfc, which keeps more digits of results near zero. On a TPU erfc takes as long as the product
    before it; erf runs while the product does.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def tanh_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """GELU to within 1.2e-5, which bfloat16 cannot tell from the exact one above 0.006; x is float32.

    A TPU has an instruction for tanh, but computes erf from some twenty operations. The usual approximation by tanh
    (Hendrycks and Gimpel, 2016) is off by 5e-4.
    """
    square = jnp.minimum(x * x, LARGEST_SQUARE)
    a, b, c, d = COEFFICIENTS
    half = 0.5 * x
    return half + half * jnp.tanh(x * (a + square * (b + square * (c + square * d))))
