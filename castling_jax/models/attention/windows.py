"""Window attention: softmax attention within windows of the grid, which every second block shifts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from castling_jax.models.attention.core import Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.layers import Layers

WINDOW_SIZE = 7  # Swin's


class WindowAttention(MultiHeadAttention):
    """W-MSA in even blocks and SW-MSA in odd ones (Liu et al., Swin Transformer, ICCV 2021, equations 3 and 4).

    A token attends to the tokens in its window of M x M tokens: softmax(Q K^T / sqrt(d) + B) V. A learned table gives B
    for each of the (2M - 1)^2 offsets between query and key, for each head. Odd blocks shift the windows by M // 2 rows
    and columns: the grid is rolled, and a mask separates tokens that only the roll made neighbours. Linear in tokens.

    As in Swin's code, a window is at most as high and as wide as the grid and is not shifted along a side that it
    spans; a grid that is no multiple of the window is padded at its end. Swin attends to the padding; here a mask hides
    it. An image of another size keeps M. Offsets that no training image had then keep their initial bias.

    Swin has no class token. Here class and distillation token are keys and values in every window, and their queries
    attend to all tokens. These tokens have no place on the grid, so their scores have no bias.
    """

    def add_layers(self, layers: Layers) -> None:
        self.window_size = self.core.window_size or WINDOW_SIZE
        self.relative_position_bias_table = layers.embedding((2 * self.window_size - 1) ** 2, self.num_heads)

    def attend(
        self,
        q: Float[Array, "batch tokens heads dim"],
        k: Float[Array, "batch tokens heads dim"],
        v: Float[Array, "batch tokens heads dim"],
        places: Places,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens heads dim"], Float[Array, ""]]:
        attention, first = self.core.kind.function, places.prefix_tokens
        windows = Windows(places.grid, self.window_size, shifted=self.core.block % 2 == 1)
        table = self.relative_position_bias_table[...].astype(jnp.float32)
        bias = jnp.moveaxis(table[windows.offsets], 2, 0)[:, None]
        bias = jnp.where(windows.apart, -jnp.inf, bias)  # [heads, windows, queries, keys]
        # Zeros in front: the prefix keys come before a window's own keys, and their scores have no bias.
        bias = jnp.pad(bias.reshape(1, -1, *bias.shape[2:]), ((0, 0), (0, 0), (0, 0), (first, 0)))

        def keys(x: Array) -> Array:
            # Windows are heads here, and the windows of one head lie side by side: so must its copies of the prefix.
            prefix = jnp.repeat(x[:, :first], math.prod(windows.counts), axis=2)
            return jnp.concatenate([prefix, windows.cut(x[:, first:])], axis=1)

        out = windows.join(attention(windows.cut(q[:, first:]), keys(k), keys(v), bias=bias))
        # Prefix queries are in no window: they attend to all tokens in a call of their own.
        if first:
            out = jnp.concatenate([attention(q[:, :first], k, v), out], axis=1)
        return out, jnp.zeros((), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a grid: `size` tokens a side, from the first token on, or `shifted` by half their side.

    Each window of each head counts as a head, so that one call of the softmax computes them all, with a bias for each
    window. Windows of the same head are adjacent, so that a mesh that splits heads does not split a head's windows.
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
        """Windows along the grid's height and width; the last one may extend past the end of the grid."""
        return math.ceil(self.grid[0] / self.sides[0]), math.ceil(self.grid[1] / self.sides[1])

    @property
    def shifts(self) -> list[int]:
        """The rows and columns that the grid is rolled by: 0 along a side that a window spans."""
        sides = zip(self.sides, self.grid, strict=True)
        return [side // 2 if self.shifted and side < size else 0 for side, size in sides]

    @property
    def back(self) -> list[int]:
        """The roll that moves the first token of a shifted window to the first place of a window."""
        return [-shift for shift in self.shifts]

    def cut(self, x: Float[Array, "batch tokens heads dim"]) -> Float[Array, "batch window_tokens heads_windows dim"]:
        """Cuts the grid's tokens, padded with zeros, into windows."""
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
        """Which queries and keys of a window the mask separates: only the roll made them neighbours, or one is padding.

        Padding attends to padding, so that no row of a softmax is empty; `join` drops the result.
        """
        (height, width), (rows, columns) = self.sides, self.counts
        # Tokens in one region may attend to each other. Rows and columns are told apart by different numbers, 1 and 2,
        # so that the four corners of a grid that is rolled along both axes are four regions.
        region = np.zeros((rows * height, columns * width), int)
        region[: self.shifts[0]] += 1  # the rows that the roll brings to the bottom
        region[:, : self.shifts[1]] += 2
        region[self.grid[0] :] = region[:, self.grid[1] :] = -1
        tiles = np.roll(region, self.back, axis=(0, 1)).reshape(rows, height, columns, width)
        regions = tiles.swapaxes(1, 2).reshape(rows * columns, height * width)
        return regions[:, :, None] != regions[:, None, :]

    @property
    def offsets(self) -> Int[np.ndarray, "queries keys"]:
        """The row of the table of (2 size - 1)^2 offsets for each query and key of a window."""
        down, across = (np.arange(side)[:, None] - np.arange(side) + self.size - 1 for side in self.sides)
        # The table's rows belong to the full size, also where the grid is smaller, so that weights fit every grid.
        index = down[:, None, :, None] * (2 * self.size - 1) + across[None, :, None, :]
        return index.reshape(math.prod(self.sides), -1)
