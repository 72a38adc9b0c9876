"""A bias in two factors in the softmax kernels: a product with ones where a key lies in that row or column."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from castling_jax.ops.tpu.layout import LANES, Heads

MINUS_INFINITY = -1e30


def join_factors(rows: jax.Array, columns: jax.Array, batch: int, dtype: jnp.dtype) -> jax.Array:
    """Two factors of a bias, [1 or batch, heads, queries, rows] and [..., columns], as [batch, queries, heads * width].

    Each head's lanes are a power of two, so that none has a part of two registers.
    """
    factors = jnp.concatenate([_by_query(factor, batch, dtype) for factor in (rows, columns)], axis=3)
    size = factors.shape[3]
    padded = jnp.pad(factors, [(0, 0)] * 3 + [(0, _head_width(size) - size)])
    return padded.reshape(batch, padded.shape[1], -1)


def _by_query(factor: jax.Array, batch: int, dtype: jnp.dtype) -> jax.Array:
    """[1 or batch, heads, queries, size] as [batch, queries, heads, size], finite.

    -inf, which times a mark of zero would be NaN, is a number that no weight survives.
    """
    finite = jnp.maximum(factor, MINUS_INFINITY)
    return jnp.moveaxis(jnp.broadcast_to(finite, (batch, *factor.shape[1:])).astype(dtype), 1, 2)


def _head_width(size: int) -> int:
    return 1 << (size - 1).bit_length()


def factor_bytes(factors: jax.Array, heads: int, *, group: int, block: int, keys: int) -> int:
    """What the backward kernel needs of the fast memory for them: for a group of heads their blocks and the marks."""
    width = factors.shape[2] // heads
    marks = keys * max(LANES, width) * min(group, max(1, LANES // width))
    return factors.dtype.itemsize * (4 * block * group * width + 2 * marks)


def factor_inputs(
    layout: Heads, block: int, factors: jax.Array, sides: tuple[int, int]
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """The factors by steps along the heads and the marks, and their blocks, for a grid of (step, batch, block)."""
    batch, queries, width = factors.shape
    by_step = jnp.moveaxis(factors.reshape(batch, queries, layout.steps, -1), 2, 0)
    marks = _marks(sides, layout.step_heads, factors.dtype)
    return [by_step, marks], [
        pl.BlockSpec((1, 1, block, width // layout.steps), lambda h, b, i: (h, b, i, 0)),
        pl.BlockSpec(marks.shape, lambda h, b, i: (0, 0, 0)),
    ]


def _marks(sides: tuple[int, int], heads: int, dtype: jnp.dtype) -> jax.Array:
    """Ones where a key lies in a factor's row or column, [heads, keys, lanes]: the product with factors is the bias.

    For as many heads as share a register's lanes, each in lanes of its own.
    """
    rows, columns = sides
    width = _head_width(rows + columns)
    place = np.arange(rows * columns)
    marks = np.zeros((len(place), width))
    marks[place, place // columns] = marks[place, rows + place % columns] = 1
    together = min(heads, max(1, LANES // width))
    return jnp.asarray(np.einsum("hg,kw->hkgw", np.eye(together), marks).reshape(together, len(place), -1), dtype)


def factor_lanes(head: int, factors_ref: Any, marks_ref: Any) -> tuple[slice, jax.Array]:
    """The lanes of a step's factors in which a head's are, and the marks that are the head's in them."""
    together, _, width = marks_ref.shape
    start = head // together * width
    lanes = slice(start, min(start + width, factors_ref.shape[3]))
    return lanes, marks_ref[head % together, :, : lanes.stop - lanes.start]


def append_factors(
    q: jax.Array, k: jax.Array, factors: tuple[jax.Array, jax.Array], scale: float
) -> tuple[jax.Array, jax.Array]:
    """Scaled queries and the factors beside them, keys and the ones beside them, for the kernels in blocks."""
    rows, columns = (_by_query(factor, q.shape[0], q.dtype) for factor in factors)
    place = jnp.arange(k.shape[1])
    in_row = jax.nn.one_hot(place // columns.shape[3], rows.shape[3], dtype=k.dtype)
    in_column = jax.nn.one_hot(place % columns.shape[3], columns.shape[3], dtype=k.dtype)
    marks = jnp.concatenate([in_row, in_column], axis=1)[None, :, None]
    marks = jnp.broadcast_to(marks, (*k.shape[:3], marks.shape[3]))
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return jnp.concatenate([scaled, rows, columns], axis=3), jnp.concatenate([k, marks], axis=3)
