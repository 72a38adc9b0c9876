"""Layer norm, and division by the L2 norm with its convention for zero vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Vectors with a squared norm up to this, a norm of 1e-10, pass no gradient, as zero vectors do. Those are common: with
# biases that start at zero, a patch of zeros has q = k = v = 0. There the derivative of x / |x| is 1 / 0, and an
# epsilon under the root would only make it huge.
ZERO_SQUARED_NORM = 1e-20


def layer_norm(
    x: Float[Array, "*axes channels"],
    scale: Float[Array, "*rows channels"],
    bias: Float[Array, "*rows channels"],
    epsilon: float,
) -> Float[Array, "*axes channels"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the channels, in x's dtype (Ba et al., 2016)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(x.dtype)


def inverse_norms(squared_norms: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """1 / max(|x|, 1e-10), computed from |x|^2. A zero vector times this is zero."""
    return jax.lax.rsqrt(jnp.maximum(squared_norms, ZERO_SQUARED_NORM))


def inverse_norms_or_zero(squared_norms: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """1 / |x| computed from |x|^2, but 0 for a zero vector, so that a zero vector passes no gradient."""
    is_zero = squared_norms <= ZERO_SQUARED_NORM  # false for NaN, which so reaches the result and is noticed
    return jnp.where(is_zero, 0, jax.lax.rsqrt(squared_norms))


@jax.custom_jvp
def l2_normalize(x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
    """x / max(|x|, 1e-10) along the last axis, in float32 or wider, for norms up to 1e19.

    Vectors with a norm up to 1e-10 pass no gradient, as zero vectors do.
    """
    wide, squared_norms = _square(x)
    return wide * inverse_norms(squared_norms)


@l2_normalize.defjvp
def _l2_normalize_jvp(primals, tangents):
    wide, squared_norms = _square(*primals)
    squared_norms = jnp.maximum(squared_norms, ZERO_SQUARED_NORM)  # keeps second derivatives finite as well
    normal = wide * inverse_norms(squared_norms)
    x_dot = tangents[0].astype(wide.dtype)
    # The textbook form x_dot / |x| - x (x . x_dot) / |x|^3 would under- or overflow for norms far from 1.
    across = x_dot - normal * jnp.sum(normal * x_dot, axis=-1, keepdims=True)
    return normal, inverse_norms_or_zero(squared_norms) * across


def _square(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and its squared norm, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide, jnp.sum(wide * wide, axis=-1, keepdims=True)
