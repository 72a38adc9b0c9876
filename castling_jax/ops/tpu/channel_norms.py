"""Batch norm's last step inside the kernels: q, k and v are normalised where they are read.

Before the kernels, this step would be a pass over memory of its own, and its gradient would be two: the sums over all
tokens that the norm's parameters need, and a product for each number.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from castling_jax.ops.tpu.call import Operand, Refs

NAMES = ("q", "k", "v")
Norms = tuple[jax.Array, ...] | None  # of q, k and v, each [3, heads * dim]


def norm_inputs(norms: Norms, widths: tuple[int, int, int], step: int) -> dict[str, Operand]:
    """The norms as inputs of a kernel whose step along the heads, axis `step` of its grid, has these lanes."""
    of_names = zip(NAMES, norms or (None, None, None), widths, strict=True)
    return {
        f"norm_{name}": (norm, pl.BlockSpec((3, width), lambda *indices: (0, indices[step])))
        for name, norm, width in of_names
    }


def norm_outputs(norms: Norms, widths: tuple[int, int, int], batch: int, axes: tuple[int, int]) -> dict[str, Operand]:
    """Each image's sums for the norms' gradients: of d, and of d (x - mean), where d is a normalised array's gradient.

    `axes` are the grid's axes of (images, steps along the heads).
    """
    image, step = axes
    of_names = zip(NAMES, norms or (None, None, None), widths, strict=True)
    return {
        f"sums_{name}": (
            None if norm is None else jax.ShapeDtypeStruct((batch, 2, norm.shape[1]), jnp.float32),
            pl.BlockSpec((1, 2, width), lambda *indices: (indices[image], 0, indices[step])),
        )
        for name, norm, width in of_names
    }


def read(refs: Refs, name: str, lanes: slice, rows: slice = slice(None)) -> jax.Array:
    """Lanes of an image's q, k or v: as they are, or normalised and float32."""
    x, norm = getattr(refs, name)[0, rows, lanes], getattr(refs, f"norm_{name}")
    if norm is None:
        return x
    return (x.astype(jnp.float32) - norm[0:1, lanes]) * norm[1:2, lanes] + norm[2:3, lanes]


def through_channel_norm(refs: Refs, name: str, lanes: slice, gradient: jax.Array, valid=None, *, add: bool = False):
    """The gradient of q, k or v as it came, from the normalised one's; writes the norm's sums, or adds to them.

    Rows that are not `valid` may hold anything; their gradient is zero.
    """
    norm, sums = getattr(refs, f"norm_{name}"), getattr(refs, f"sums_{name}")
    if norm is None:
        return gradient
    centred = getattr(refs, name)[0, :, lanes].astype(jnp.float32) - norm[0:1, lanes]
    if valid is not None:
        centred = jnp.where(valid, centred, 0)
    for row, terms in enumerate((gradient, gradient * centred)):
        total = jnp.sum(terms, axis=0, keepdims=True)
        sums[0, row : row + 1, lanes] = total + (sums[0, row : row + 1, lanes] if add else 0)
    return gradient * norm[1:2, lanes]


def norm_gradients(norms: Norms, gradients: dict[str, Any]) -> Norms:
    """The gradients of the norms from the sums among a kernel's outputs."""

    def of(name: str, norm: jax.Array) -> jax.Array:
        d_bias, d_factor = gradients[f"sums_{name}"].sum(0)
        return jnp.stack([-norm[1] * d_bias, d_factor, d_bias])

    return None if norms is None else tuple(map(of, NAMES, norms))
