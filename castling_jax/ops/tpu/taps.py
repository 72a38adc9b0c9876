"""The convolution of the values inside a kernel: shifted reads of a padded copy in fast memory."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.layout import LANES

SUBLANES = 8  # rows of a register of float32


@dataclasses.dataclass(frozen=True)
class TapPositions:
    """Where the taps of a token kernel stand.

    Attributes:
      rows: rows of taps; 1 over the token axis.
      columns: columns of taps.
      grid_width: tokens in a row of the grid. Taps that reach beyond a row's ends read zeros. None over the token axis.
      prefix: tokens before the grid, which `convolve` leaves out.
    """

    rows: int
    columns: int
    grid_width: int | None
    prefix: int = 0

    @property
    def count(self) -> int:
        """The number of taps."""
        return self.rows * self.columns

    @property
    def pad(self) -> int:
        """Rows of padding before and after the tokens: as far as the taps reach, in whole registers."""
        reach = self.rows // 2 * (self.grid_width or 0) + self.columns // 2
        return -(-max(reach, 1) // SUBLANES) * SUBLANES

    @property
    def copies(self) -> int:
        """The number of padded copies. On a grid each column of taps has a copy without the tokens it must not see."""
        return 1 if self.grid_width is None else self.columns

    def scratch_bytes(self, tokens: int, width: int) -> int:
        """The size of `scratch` in bytes."""
        return 4 * self.copies * (tokens + 2 * self.pad) * width

    def scratch(self, tokens: int, width: int):
        """Room for the padded copies of [tokens, width]."""
        # float32 for bfloat16 values too: a float32 register has one row a sublane, so that a shift by a row is a plain
        # read at an offset. bfloat16 packs two rows into a sublane.
        return pltpu.VMEM((self.copies, tokens + 2 * self.pad, width), jnp.float32)

    def convolve(self, padded_ref, x: jax.Array, taps: jax.Array) -> jax.Array:
        """DWConv(x) for x [tokens, width] and taps [taps, width]; zero at the prefix tokens, which no tap reads."""
        if self.prefix:
            is_patch = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) >= self.prefix
            x = jnp.where(is_patch, x, 0.0)
        products = (window * taps[tap : tap + 1] for tap, window in enumerate(self.windows(padded_ref, x)))
        out = functools.reduce(jnp.add, products)
        return jnp.where(is_patch, out, 0.0) if self.prefix else out

    def windows(
        self, padded_ref, x: jax.Array, leading: jax.Array | None = None, trailing: jax.Array | None = None
    ) -> Iterator[jax.Array]:
        """What each tap reads for all tokens, in the order of the kernel's rows: the tokens, shifted to the tap.

        Args:
          padded_ref: memory from `scratch`, at least as wide as `x`.
          x: [tokens, width].
          leading: the `pad` tokens before `x` on the token axis; None stands for zeros.
          trailing: the `pad` tokens after `x` on the token axis; None stands for zeros.
        """
        tokens, width = x.shape
        zeros = jnp.zeros((self.pad, width), jnp.float32)
        for copy in range(self.copies):
            padded_ref[copy, : self.pad, :width] = zeros if leading is None else leading
            padded_ref[copy, self.pad + tokens :, :width] = zeros if trailing is None else trailing
            padded_ref[copy, self.pad : self.pad + tokens, :width] = self._visible(copy, x)
        for row in range(self.rows):
            for column in range(self.columns):
                shift = (row - self.rows // 2) * (self.grid_width or 0) + column - self.columns // 2
                yield padded_ref[column % self.copies, pl.ds(self.pad + shift, tokens), :width]

    def _visible(self, column: int, x: jax.Array) -> jax.Array:
        """The tokens, with zeros where a column of taps would reach from one row of the grid into the next."""
        across = column - self.columns // 2
        if self.grid_width is None or not across:
            return x
        # The column of each token, computed for the lanes of one register and repeated for the others, which are alike.
        # The product with 1 / grid_width replaces an integer division, which is slow on a TPU. It is exact up to 2^20
        # tokens.
        lanes = math.gcd(x.shape[1], LANES)
        token = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], lanes), 0).astype(jnp.float32) - self.prefix
        grid_column = token - self.grid_width * jnp.floor((token + 0.5) * (1 / self.grid_width))
        grid_column = jnp.concatenate([grid_column] * (x.shape[1] // lanes), axis=1)
        return jnp.where(grid_column >= across if across > 0 else grid_column < self.grid_width + across, x, 0.0)


def tap_positions(kernel: jax.Array | None, grid: tuple[int, int] | None, prefix_tokens: int = 0) -> TapPositions:
    """Where the taps of a token kernel stand: [taps, heads], or [rows, columns, heads] on a grid; None is one tap.

    `prefix_tokens` come before the grid.
    """
    if kernel is None:
        return TapPositions(1, 1, None)
    if grid is None:
        return TapPositions(1, kernel.shape[0], None)
    return TapPositions(kernel.shape[0], kernel.shape[1], grid[1], prefix_tokens)


def spread_taps(kernel: jax.Array | None, heads: int, value_dim: int) -> jax.Array:
    """A token kernel as [taps, heads * value_dim] in float32; None becomes one tap of zero."""
    if kernel is None:
        return jnp.zeros((1, heads * value_dim), jnp.float32)
    return jnp.repeat(kernel.reshape(-1, heads).astype(jnp.float32), value_dim, axis=1)
