"""How heads lie in a TPU's registers, which have 128 lanes.

Arrays stay [batch, tokens, heads * dim]: transposing heads costs a TPU more than the attention itself. As many heads as
fill whole registers form a group, and a group is multiplied in one product. The products between different heads of a
group are masked out. They cost nothing, because a matrix unit of 128 x 128 takes as long for a smaller matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# The size of all blocks of one grid step may be this much: each has two buffers, and the kernel's own values need room
# beside them. Every generation since v4 has at least 16 MB of fast memory.
BLOCK_BYTES = 4 * 2**20

# The fast memory that is assumed where no TPU is at hand: that of v5p and TPU7x. v5e and v6e have twice as much.
USUAL_FAST_MEMORY = 64 * 2**20

NN = (((1,), (0,)), ((), ()))  # a @ b
NT = (((1,), (1,)), ((), ()))  # a @ b.T
TN = (((0,), (0,)), ((), ()))  # a.T @ b


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of arrays and `static` arguments: it is traced once for all blocks of a model.

    Tracing the kernels takes longer than tracing the rest of a model. The program is the same as without the decorator.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention, and how many of them a kernel works on together.

    Attributes:
      heads: the number of heads.
      key_dim: channels of each head's queries and keys.
      value_dim: channels of each head's values.
      group: heads in a group.
      step: groups in one grid step.
    """

    heads: int
    key_dim: int
    value_dim: int
    group: int
    step: int

    @property
    def steps(self) -> int:
        """Grid steps along the heads."""
        return self.heads // (self.group * self.step)

    @property
    def step_heads(self) -> int:
        """Heads in one grid step."""
        return self.group * self.step

    @property
    def step_widths(self) -> tuple[int, int, int]:
        """Lanes of q, k and v in one grid step."""
        keys = self.step_heads * self.key_dim
        return keys, keys, self.step_heads * self.value_dim

    def key_lanes(self, group: int) -> slice:
        """Lanes of a group's keys within a step's block."""
        width = self.group * self.key_dim
        return slice(group * width, (group + 1) * width)

    def value_lanes(self, group: int) -> slice:
        """Lanes of a group's values within a step's block."""
        width = self.group * self.value_dim
        return slice(group * width, (group + 1) * width)

    def windows(self, *dims: int) -> list[tuple[range, list[slice]]]:
        """Cuts a step's blocks into windows, wherever a register and a head end together in all blocks.

        Products are computed window by window: with more lanes of other heads a matrix unit would only take longer.

        Args:
          *dims: lanes of a head in each of the blocks.

        Returns:
          For each window its heads, and its lanes in each of the blocks.
        """
        size = math.lcm(*(math.lcm(dim, LANES) // dim for dim in dims))
        heads = range(self.step_heads)
        windows = [heads[first : first + size] for first in range(0, self.step_heads, size)]
        return [(window, [slice(window.start * dim, window.stop * dim) for dim in dims]) for window in windows]


def arrange(heads: int, key_dim: int, value_dim: int, *, bytes_per_head: int) -> Heads:
    """Chooses the smallest groups that fill whole registers, and as many groups a grid step as fit the fast memory.

    Args:
      heads: the number of heads.
      key_dim: channels of each head's queries and keys.
      value_dim: channels of each head's values.
      bytes_per_head: size of one head's part of all blocks of a step.
    """
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    fills = [size for size in divisors if size * key_dim % LANES == 0 and size * value_dim % LANES == 0]
    # A block must end where a register or the array ends. So where no group fills registers, all heads are one group.
    group = min(fills, default=heads)
    groups = heads // group
    steps = [
        count for count in range(1, groups + 1) if groups % count == 0 and count * group * bytes_per_head <= BLOCK_BYTES
    ]
    return Heads(heads, key_dim, value_dim, group, max(steps, default=1))


def same_head(heads: int, rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
    """Ones where a row and a column belong to the same head, zeros elsewhere.

    With rows = columns, the product with it sums over each head's lanes and leaves the sum in all of them.

    Args:
      heads: the number of heads.
      rows: rows of each head.
      columns: columns of each head.
      dtype: dtype of the result.
    """
    return jnp.asarray(np.kron(np.eye(heads), np.ones((rows, columns))), dtype)


def lanes_of_head(head: int, dim: int, shape: tuple[int, ...]) -> jax.Array:
    """Whether a lane belongs to one head of its group, for an array [tokens, lanes]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head * dim) & (lane < (head + 1) * dim)


def rows_of_head(head: int, dim: int, shape: tuple[int, ...]) -> jax.Array:
    """Whether a row belongs to one head of its group, for an array [lanes, tokens], the transpose of a product."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= head * dim) & (row < (head + 1) * dim)


def product(dtype: jnp.dtype):
    """dot_general with a float32 sum: of bfloat16 numbers where that is the arrays' dtype, else of exact float32."""
    if dtype == jnp.bfloat16:
        return lambda a, b, dims: jax.lax.dot_general(
            a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32
        )
    return functools.partial(
        jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def fast_memory_bytes() -> int:
    """The fast memory of the TPU at hand or of the mesh in use, or a usual size where neither is known.

    The size decides only whether a kernel works on whole sequences or on blocks of tokens.
    """
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # there is no TPU, or JAX does not know this one yet
        return USUAL_FAST_MEMORY


def compiler_params(
    *dimensions: Literal["parallel", "arbitrary"], block_bytes: int, staying_bytes: int = 0
) -> pltpu.CompilerParams:
    """The compiler's options: the grid's semantics, and a limit on the fast memory.

    Args:
      *dimensions: of each axis of the grid, whether its steps are independent ("parallel") or run in order, because
        they add to one sum ("arbitrary").
      block_bytes: size of all blocks of a step.
      staying_bytes: size of what stays in the fast memory from step to step.
    """
    # Eight times the blocks are two buffers of each and the kernel's own values in float32. 16 MB more, which every
    # generation has, are for what does not grow with the blocks.
    needed = math.ceil((8 * block_bytes + staying_bytes) / 2**20) + 16
    room = min(needed * 2**20, fast_memory_bytes())
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=room)
