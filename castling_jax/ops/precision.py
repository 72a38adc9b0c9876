"""How exactly a TPU multiplies."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Of products computed in float32: the highest, unless the arrays they come from were of bfloat16.

    By default a TPU rounds what it multiplies to bfloat16, which loses nothing only of what was of bfloat16.
    """
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
