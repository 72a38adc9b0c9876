"""The L2 norm of a vector, and what a zero vector normalises to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A squared norm up to this, a norm of 1e-10, is a zero vector's. Zero vectors are common: a patch of zeros under biases
# that start at zero has q = k = v = 0. The derivative of x / |x| there is 1 / 0, and an epsilon under the root only
# makes it huge.
ZERO_SQUARED_NORM = 1e-20


def inverse_norms(squared_norms: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """1 / max(|x|, 1e-10) from |x|^2: with it a zero vector normalises to zero."""
    return jax.lax.rsqrt(jnp.maximum(squared_norms, ZERO_SQUARED_NORM))


def inverse_norms_or_zero(squared_norms: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """1 / |x|, but 0 for a zero vector: with it, a zero vector passes no gradient."""
    is_zero = squared_norms <= ZERO_SQUARED_NORM  # written so that NaN is kept, and seen
    return jnp.where(is_zero, 0, jax.lax.rsqrt(squared_norms))


@jax.custom_jvp
def l2_normalize(x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
    """x / max(|x|, 1e-10) along the last axis, in float32 at least, for norms up to 1e19.

    A zero vector, which is any of a norm up to 1e-10, passes no gradient.
    """
    wide, squared_norms = _square(x)
    return wide * inverse_norms(squared_norms)


@l2_normalize.defjvp
def _l2_normalize_jvp(primals, tangents):
    wide, squared_norms = _square(*primals)
    squared_norms = jnp.maximum(squared_norms, ZERO_SQUARED_NORM)  # second derivatives are finite, too
    normal = wide * inverse_norms(squared_norms)
    x_dot = tangents[0].astype(wide.dtype)
    # Without a power of the norm, which would under- or overflow far from 1.
    across = x_dot - normal * jnp.sum(normal * x_dot, axis=-1, keepdims=True)
    return normal, inverse_norms_or_zero(squared_norms) * across


def _square(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and its squared norm, in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide, jnp.sum(wide * wide, axis=-1, keepdims=True)
