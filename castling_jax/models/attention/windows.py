"""Window attention: softmax within windows of the grid, which every second block shifts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.layers import Layers

WINDOW_SIZE = 7  # Swin's


class WindowAttention(MultiHeadAttention):
    """W-MSA in even blocks and SW-MSA in odd ones (Liu et al., Swin Transformer, ICCV 2021, equations 3 and 4).

    A token attends to the tokens of its window of M x M: softmax(Q K^T / sqrt(d) + B) V, with B looked up by the offset
    of query and key in a learned table of (2M - 1)^2 offsets for each head. Odd blocks shift the windows by M // 2 rows
    and columns. The grid is rolled for that, and a mask keeps tokens apart that were not neighbours before. Linear in
    tokens.

    As in Swin's code, a window is at most as high and as wide as the grid and is not shifted along a side that it
    spans; a grid that is no multiple of the window is padded at its end. Swin attends to the padding, and here a mask
    hides it. An image of another size keeps M. Offsets that no training image had then have their initial bias.

    Swin has no class token. Here class and distillation token are keys and values of every window, and they attend to
    all tokens; neither has a relative position, so their scores have no bias.
    """

    def add_layers(self, layers: Layers) -> None:
        self.window_size = self.core.window_size or WINDOW_SIZE
        self.relative_position_bias_table = layers.embedding((2 * self.window_size - 1) ** 2, self.num_heads)

    def attend(
        self,
        q: Float[Array, "batch tokens heads dim"],
        k: Float[Array, "batch tokens heads dim"],
        v: Float[Array, "batch tokens heads dim"],
        grid: tuple[int, int],
        prefix_tokens: int,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens heads dim"], Float[Array, ""]]:
        attention, first = self.core.kind.function, prefix_tokens
        windows = Windows(grid, self.window_size, shifted=self.core.block % 2 == 1)
        table = self.relative_position_bias_table[...].astype(jnp.float32)
        bias = jnp.moveaxis(table[windows.offsets], 2, 0)[:, None]
        bias = jnp.where(windows.apart, -jnp.inf, bias)  # [heads, windows, queries, keys]
        bias = jnp.pad(bias.reshape(1, -1, *bias.shape[2:]), ((0, 0), (0, 0), (0, 0), (first, 0)))

        def keys(x: Array) -> Array:
            # Every window has the prefix tokens, in front of its own.
            prefix = jnp.repeat(x[:, :first], math.prod(windows.counts), axis=2)
            return jnp.concatenate([prefix, windows.cut(x[:, first:])], axis=1)

        out = windows.join(attention(windows.cut(q[:, first:]), keys(k), keys(v), bias=bias))
        if first:
            out = jnp.concatenate([attention(q[:, :first], k, v), out], axis=1)
        return out, jnp.zeros((), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Windows:
    """How windows lie on a grid: `size` tokens a side, from the first token on, or `shifted` by half their side.

    The windows of a head stand beside one another as heads of their own, so that all of them are one call of a softmax
    whose bias differs from window to window. The head comes first: a mesh that splits heads keeps them apart.
    """

    grid: tuple[int, int]
    size: int
    shifted: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a window: at most the grid's."""
        return min(self.size, self.grid[0]), min(self.size, self.grid[1])

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along the grid's height and width, the last of which may reach over the end."""
        return math.ceil(self.grid[0] / self.sides[0]), math.ceil(self.grid[1] / self.sides[1])

    @property
    def shifts(self) -> list[int]:
        """By how many rows and columns the grid is rolled; a window that spans the grid stays where it is."""
        sides = zip(self.sides, self.grid, strict=True)
        return [side // 2 if self.shifted and side < size else 0 for side, size in sides]

    @property
    def back(self) -> list[int]:
        """The roll that brings a shifted window's first token to a window's first place."""
        return [-shift for shift in self.shifts]

    def cut(self, x: Float[Array, "batch tokens heads dim"]) -> Float[Array, "batch window_tokens heads_windows dim"]:
        """The grid's tokens, zero padded, by their place in their window."""
        batch, _, heads, dim = x.shape
        (height, width), (rows, columns) = self.sides, self.counts
        padding = (0, rows * height - self.grid[0]), (0, columns * width - self.grid[1])
        x = jnp.pad(x.reshape(batch, *self.grid, heads, dim), ((0, 0), *padding, (0, 0), (0, 0)))
        x = jnp.roll(x, self.back, axis=(1, 2)).reshape(batch, rows, height, columns, width, heads, dim)
        return x.transpose(0, 2, 4, 5, 1, 3, 6).reshape(batch, height * width, heads * rows * columns, dim)

    def join(self, x: Float[Array, "batch window_tokens heads_windows dim"]) -> Float[Array, "batch tokens heads dim"]:
        """The inverse of `cut`."""
        batch, _, _, dim = x.shape
        (height, width), (rows, columns) = self.sides, self.counts
        x = x.reshape(batch, height, width, -1, rows, columns, dim).transpose(0, 4, 1, 5, 2, 3, 6)
        x = jnp.roll(x.reshape(batch, rows * height, columns * width, -1, dim), self.shifts, axis=(1, 2))
        return x[:, : self.grid[0], : self.grid[1]].reshape(batch, math.prod(self.grid), -1, dim)

    @property
    def apart(self) -> Bool[np.ndarray, "windows queries keys"]:
        """Which of a window's tokens do not see each other: those that only the roll has brought together, and padding.

        Padding sees padding, so that no row of a softmax is empty; nothing reads what comes of it.
        """
        (height, width), (rows, columns) = self.sides, self.counts
        region = np.zeros((rows * height, columns * width), int)
        region[: self.shifts[0]] += 1  # the rows that the roll brings to the bottom
        region[:, : self.shifts[1]] += 2
        region[self.grid[0] :] = region[:, self.grid[1] :] = -1
        tiles = np.roll(region, self.back, axis=(0, 1)).reshape(rows, height, columns, width)
        regions = tiles.swapaxes(1, 2).reshape(rows * columns, height * width)
        return regions[:, :, None] != regions[:, None, :]

    @property
    def offsets(self) -> Int[np.ndarray, "queries keys"]:
        """The row of the table of offsets, of windows of size x size, for each query and key of a window."""
        down, across = (np.arange(side)[:, None] - np.arange(side) + self.size - 1 for side in self.sides)
        index = down[:, None, :, None] * (2 * self.size - 1) + across[None, :, None, :]
        return index.reshape(math.prod(self.sides), -1)
