"""The convolution of the values inside a kernel: shifted reads of a padded copy in fast memory."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.layout import LANES

SUBLANES = 8  # rows of a register of float32


@dataclasses.dataclass(frozen=True)
class Taps:
    """Where the taps of a token kernel stand.

    Attributes:
      rows: of taps; 1 over the token axis.
      columns: of taps.
      grid_width: tokens in a row of the grid, beyond whose ends there is nothing; None over the token axis.
    """

    rows: int
    columns: int
    grid_width: int | None

    @property
    def count(self) -> int:
        """All of them."""
        return self.rows * self.columns

    @property
    def pad(self) -> int:
        """Rows kept free before and after the tokens: as far as taps reach, in whole registers."""
        reach = self.rows // 2 * (self.grid_width or 0) + self.columns // 2
        return -(-max(reach, 1) // SUBLANES) * SUBLANES

    @property
    def copies(self) -> int:
        """Padded copies: on a grid one for each column of taps, without the tokens that it must not see."""
        return 1 if self.grid_width is None else self.columns

    def scratch_bytes(self, tokens: int, width: int) -> int:
        """What `scratch` takes."""
        return 4 * self.copies * (tokens + 2 * self.pad) * width

    def scratch(self, tokens: int, width: int):
        """Room for the padded copies of [tokens, width]."""
        return pltpu.VMEM((self.copies, tokens + 2 * self.pad, width), jnp.float32)

    def windows(
        self, padded_ref, x: jax.Array, leading: jax.Array | None = None, trailing: jax.Array | None = None
    ) -> Iterator[jax.Array]:
        """What the tokens see through each tap, in the order of the kernel's rows: the tokens, so far shifted.

        Args:
          padded_ref: `scratch`, of as many lanes at least.
          x: [tokens, width].
          leading: what stands before them over the token axis, `pad` rows; None is zeros.
          trailing: likewise behind them.
        """
        tokens, width = x.shape
        zeros = jnp.zeros((self.pad, width), jnp.float32)
        for copy in range(self.copies):
            padded_ref[copy, : self.pad, :width] = zeros if leading is None else leading
            padded_ref[copy, self.pad + tokens :, :width] = zeros if trailing is None else trailing
            padded_ref[copy, self.pad : self.pad + tokens, :width] = self._seen(copy, x)
        for row in range(self.rows):
            for column in range(self.columns):
                shift = (row - self.rows // 2) * (self.grid_width or 0) + column - self.columns // 2
                yield padded_ref[column % self.copies, pl.ds(self.pad + shift, tokens), :width]

    def _seen(self, column: int, x: jax.Array) -> jax.Array:
        """The tokens that a column of taps may see: those whose row goes on as far as the token that looks."""
        across = column - self.columns // 2
        if self.grid_width is None or not across:
            return x
        # Made for one register's lanes: the others have the same. Division by a product, exact up to 2^20 tokens.
        lanes = math.gcd(x.shape[1], LANES)
        token = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], lanes), 0).astype(jnp.float32)
        place = token - self.grid_width * jnp.floor((token + 0.5) * (1 / self.grid_width))
        place = jnp.concatenate([place] * (x.shape[1] // lanes), axis=1)
        return jnp.where(place >= across if across > 0 else place < self.grid_width + across, x, 0.0)


def arrange_taps(kernel: jax.Array | None, grid: tuple[int, int] | None) -> Taps:
    """Where the taps of [taps, heads] or, on a grid, of [rows, columns, heads] stand; None is one tap."""
    if kernel is None:
        return Taps(1, 1, None)
    if grid is None:
        return Taps(1, kernel.shape[0], None)
    return Taps(kernel.shape[0], kernel.shape[1], grid[1])


def spread_taps(kernel: jax.Array | None, heads: int, value_dim: int) -> jax.Array:
    """A token kernel as [taps, heads * value_dim] in float32; None as one tap of zero."""
    if kernel is None:
        return jnp.zeros((1, heads * value_dim), jnp.float32)
    return jnp.repeat(kernel.reshape(-1, heads).astype(jnp.float32), value_dim, axis=1)
