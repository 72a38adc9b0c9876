"""The precision of products on a TPU."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision for products of float32 numbers that were converted from `dtype`: the default for bfloat16.

    By default a TPU rounds the factors of a product to bfloat16. Numbers that were bfloat16 lose nothing by this; all
    others need the highest precision.
    """
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
