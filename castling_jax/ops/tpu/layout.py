"""How heads lie in a TPU's registers of 128 lanes.

Arrays stay [batch, tokens, heads * dim]: heads are never transposed, which on a TPU costs more than the attention. As
many heads as fill whole registers form a group and are multiplied together; what one head would say to another is
masked out of the products, for a matrix unit of 128 x 128 takes no longer over it.
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
# What the blocks of one grid step may take of the fast memory, next to the kernel's own values. Every generation since
# v4 has 16 MB of it at least.
BLOCK_BYTES = 4 * 2**20

# What is taken for the fast memory where no TPU is at hand: that of v5p and TPU7x; v5e and v6e have twice as much.
USUAL_FAST_MEMORY = 64 * 2**20

NN = (((1,), (0,)), ((), ()))  # a @ b
NT = (((1,), (1,)), ((), ()))  # a @ b.T
TN = (((0,), (0,)), ((), ()))  # a.T @ b


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of arrays and `static` arguments that is traced once for all of a model's blocks.

    To trace the kernels takes longer than all the rest of a model. Nothing of it is seen in the program.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention, and how many of them are worked on together.

    Attributes:
      heads: all of them.
      key_dim: of each.
      value_dim: of each.
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

    def key_lanes(self, group: int) -> slice:
        """Lanes of a group's keys within a step's block."""
        width = self.group * self.key_dim
        return slice(group * width, (group + 1) * width)

    def value_lanes(self, group: int) -> slice:
        """Lanes of a group's values within a step's block."""
        width = self.group * self.value_dim
        return slice(group * width, (group + 1) * width)

    def windows(self, *dims: int) -> list[tuple[range, list[slice]]]:
        """A step's blocks of so many lanes a head, cut wherever a register and a head end in all of them.

        What is one head's is multiplied within its window: the lanes of other heads only take a matrix unit's time.

        Returns:
          Of each window its heads and its lanes in the blocks.
        """
        size = math.lcm(*(math.lcm(dim, LANES) // dim for dim in dims))
        heads = range(self.step_heads)
        windows = [heads[first : first + size] for first in range(0, self.step_heads, size)]
        return [(some, [slice(some.start * dim, some.stop * dim) for dim in dims]) for some in windows]


def arrange(heads: int, key_dim: int, value_dim: int, *, bytes_per_head: int) -> Heads:
    """The smallest groups that fill whole registers, and as many of them a step as fit the fast memory.

    Args:
      heads: all of them.
      key_dim: of each.
      value_dim: of each.
      bytes_per_head: what one head takes of all the blocks of a step.
    """
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    fills = [size for size in divisors if size * key_dim % LANES == 0 and size * value_dim % LANES == 0]
    group = min(fills, default=heads)
    groups = heads // group
    steps = [
        count for count in range(1, groups + 1) if groups % count == 0 and count * group * bytes_per_head <= BLOCK_BYTES
    ]
    return Heads(heads, key_dim, value_dim, group, max(steps, default=1))


def same_head(heads: int, rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
    """1 where a row of `rows` lanes a head and a column of `columns` lanes a head are of one of the heads, 0 elsewhere.

    The product with it sums over each head's lanes, and leaves the sum in all of them.
    """
    return jnp.asarray(np.kron(np.eye(heads), np.ones((rows, columns))), dtype)


def lanes_of_head(head: int, dim: int, shape: tuple[int, ...]) -> jax.Array:
    """Whether a lane belongs to one head of its group; of a shape [tokens, lanes]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head * dim) & (lane < (head + 1) * dim)


def rows_of_head(head: int, dim: int, shape: tuple[int, ...]) -> jax.Array:
    """Whether a row belongs to one head of its group; of a shape [lanes, tokens], as a product's transpose lies."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= head * dim) & (row < (head + 1) * dim)


def product(dtype: jnp.dtype):
    """dot_general with a float32 sum: of bfloat16 numbers if that is the arrays' dtype, exact float32 otherwise."""
    if dtype == jnp.bfloat16:
        return lambda a, b, dims: jax.lax.dot_general(
            a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32
        )
    return functools.partial(
        jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def fast_memory_bytes() -> int:
    """The fast memory of the TPU at hand, or of the mesh in use; of a usual one where neither is known.

    It decides only whether a kernel works on whole sequences or on blocks of them.
    """
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU, or one that JAX does not know yet
        return USUAL_FAST_MEMORY


def compiler_params(
    *dimensions: Literal["parallel", "arbitrary"], block_bytes: int, staying_bytes: int = 0
) -> pltpu.CompilerParams:
    """Grid semantics, and room in the fast memory: two buffers a block, the kernel's own float32 values, what stays."""
    needed = math.ceil((8 * block_bytes + staying_bytes) / 2**20) + 16
    room = min(needed * 2**20, fast_memory_bytes())
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=room)
