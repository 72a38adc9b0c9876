"""A factored bias in the softmax kernels: the product of its factors with ones at each key's row and column."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from castling_jax.ops.tpu.call import ABSENT, Operand, Refs, whole
from castling_jax.ops.tpu.layout import LANES, Heads

MINUS_INFINITY = -1e30


def join_factors(rows: jax.Array, columns: jax.Array, batch: int, dtype: jnp.dtype) -> jax.Array:
    """Both factors of a bias in one array, [batch, queries, heads * width].

    The width of a head is a power of two, so that no head's lanes lie across the border of two registers.

    Args:
      rows: [1 or batch, heads, queries, rows].
      columns: [1 or batch, heads, queries, columns].
      batch: size of the batch.
      dtype: dtype of the result.
    """
    factors = jnp.concatenate([_by_query(factor, batch, dtype) for factor in (rows, columns)], axis=3)
    size = factors.shape[3]
    padded = jnp.pad(factors, [(0, 0)] * 3 + [(0, _head_width(size) - size)])
    return padded.reshape(batch, padded.shape[1], -1)


def _by_query(factor: jax.Array, batch: int, dtype: jnp.dtype) -> jax.Array:
    """A factor [1 or batch, heads, queries, size] as [batch, queries, heads, size], finite.

    -inf times a zero of the marks would be NaN. It becomes a large negative number, after which no weight is left.
    """
    finite = jnp.maximum(factor.astype(dtype), MINUS_INFINITY)
    return jnp.moveaxis(jnp.broadcast_to(finite, (batch, *factor.shape[1:])), 1, 2)


def _head_width(size: int) -> int:
    return 1 << (size - 1).bit_length()


def factor_bytes(factors: jax.Array, heads: int, *, group: int, block: int, keys: int) -> int:
    """The fast memory that the backward kernel needs for a group's blocks of factors and for the marks, in bytes."""
    width = factors.shape[2] // heads
    marks = keys * max(LANES, width) * min(group, max(1, LANES // width))
    return factors.dtype.itemsize * (4 * block * group * width + 2 * marks)


def factor_inputs(
    layout: Heads, block: int, factors: jax.Array | None, sides: tuple[int, int] | None
) -> dict[str, Operand]:
    """The kernels' inputs `factors`, divided into steps along the heads, and `marks`, for a grid (step, batch, block).

    Args:
      layout: the heads.
      block: queries in a block.
      factors: from `join_factors`; None where the bias has no factors, and then the inputs are absent.
      sides: (rows, columns) of the keys' grid.
    """
    if factors is None or sides is None:
        return {"factors": ABSENT, "marks": ABSENT}
    batch, queries, width = factors.shape
    by_step = jnp.moveaxis(factors.reshape(batch, queries, layout.steps, -1), 2, 0)
    blocks = pl.BlockSpec((1, 1, block, width // layout.steps), lambda h, b, i: (h, b, i, 0))
    return {"factors": (by_step, blocks), "marks": whole(_marks(sides, layout.step_heads, factors.dtype))}


def _marks(sides: tuple[int, int], heads: int, dtype: jnp.dtype) -> jax.Array:
    """Ones at each key's row and column, [heads, keys, lanes]: their product with the factors is the bias.

    There is one matrix for each of the heads that share a register's lanes, with ones in that head's lanes.
    """
    rows, columns = sides
    width = _head_width(rows + columns)
    key = np.arange(rows * columns)
    marks = np.zeros((len(key), width))
    marks[key, key // columns] = marks[key, rows + key % columns] = 1
    together = min(heads, max(1, LANES // width))
    return jnp.asarray(np.einsum("hg,kw->hkgw", np.eye(together), marks).reshape(together, len(key), -1), dtype)


def factor_lanes(head: int, refs: Refs) -> tuple[slice, jax.Array]:
    """The lanes of a step's factors that hold a head's, and the marks of the head in these lanes."""
    together, _, width = refs.marks.shape
    start = head // together * width
    lanes = slice(start, min(start + width, refs.factors.shape[3]))
    return lanes, refs.marks[head % together, :, : lanes.stop - lanes.start]


def append_factors(
    q: jax.Array, k: jax.Array, factors: tuple[jax.Array, jax.Array], scale: float
) -> tuple[jax.Array, jax.Array]:
    """Scaled queries with the factors as more channels, and keys with the marks as more channels.

    The kernels in blocks take the bias this way: the product of the longer queries and keys is the biased scores.
    """
    rows, columns = (_by_query(factor, q.shape[0], q.dtype) for factor in factors)
    key = jnp.arange(k.shape[1])
    in_row = jax.nn.one_hot(key // columns.shape[3], rows.shape[3], dtype=k.dtype)
    in_column = jax.nn.one_hot(key % columns.shape[3], columns.shape[3], dtype=k.dtype)
    marks = jnp.concatenate([in_row, in_column], axis=1)[None, :, None]
    marks = jnp.broadcast_to(marks, (*k.shape[:3], marks.shape[3]))
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return jnp.concatenate([scaled, rows, columns], axis=3), jnp.concatenate([k, marks], axis=3)
