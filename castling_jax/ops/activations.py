"""Elementwise functions that an operation can apply to its output, so that a kernel writes only their result."""

import jax
from jaxtyping import Array, Float

ACTIVATIONS = {"hard_swish": jax.nn.hard_swish}


def activate(x: Float[Array, "..."], name: str | None) -> Float[Array, "..."]:
    """The function `name` of ACTIVATIONS applied to x; x itself for None."""
    return x if name is None else ACTIVATIONS[name](x)
