"""Position embeddings: fixed ones, and the resizing of any to another patch grid."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from castling_jax.errors import InputError, check
from castling_jax.models.layers import interpolate


def resize_position_embedding(
    embedding: Float[Array, "1 tokens channels"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int,
) -> Float[Array, "1 new_tokens channels"]:
    """Resamples the embedding's grid part with an antialiased bicubic filter, as timm's resample_abs_pos_embed does.

    Args:
      embedding: prefix (class, distillation) tokens first, then the grid's rows.
      old_grid: (height, width) of the embedding's grid, in tokens.
      new_grid: (height, width) of the result's grid, in tokens.
      prefix_tokens: number of leading tokens, which have no place on the grid and stay as they are.

    Raises:
      InputError: the embedding's number of tokens does not fit old_grid and prefix_tokens.
    """
    if embedding.shape[1] != prefix_tokens + old_grid[0] * old_grid[1]:
        parts = f"{prefix_tokens} prefix tokens and a grid of {old_grid[0]} x {old_grid[1]}"
        raise InputError(f"a position embedding of {embedding.shape[1]} tokens is not {parts}.")
    if old_grid == new_grid:
        return embedding
    channels = embedding.shape[2]
    prefix, patches = embedding[:, :prefix_tokens], embedding[:, prefix_tokens:]
    # In float32, because a bicubic filter's weights partly cancel, and embeddings may be bfloat16.
    grid = patches.reshape(1, *old_grid, channels).astype(jnp.float32)
    resized = interpolate(grid, (1, *new_grid, channels), "cubic")
    return jnp.concatenate([prefix, resized.reshape(1, -1, channels).astype(embedding.dtype)], axis=1)


def sincos_position_embedding(
    grid: tuple[int, int], channels: int, prefix_tokens: int
) -> Float[np.ndarray, "1 tokens channels"]:
    """Fixed positions of sines and cosines (He et al., MAE, appendix A.1, and its authors' code), in float32.

    The first half of the channels tells a patch's column, and the second half its row. In each half, sines come before
    cosines, and their frequencies fall from 1 to 1 / 10,000. Prefix tokens have the position 0.

    Args:
      grid: (height, width) in tokens.
      channels: a multiple of 4.
      prefix_tokens: number of leading tokens, which have no place on the grid.

    Raises:
      InputError: 4 does not divide the channels.
    """
    check(channels % 4 == 0, f"sine-cosine positions need a multiple of 4 channels, not {channels}.")
    frequencies = 10_000 ** (-np.arange(channels // 4) / (channels / 4))
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [place[:, None] * frequencies for place in (column, row)]
    patches = np.concatenate([function(angle) for angle in angles for function in (np.sin, np.cos)], axis=1)
    return np.pad(patches, ((prefix_tokens, 0), (0, 0)))[None].astype(np.float32)


def resize_relative_positions(
    table: Float[Array, "distances channels"], length: int
) -> Float[Array, "length channels"]:
    """Interpolates a table of relative positions linearly to `length` distances, as MViTv2's get_rel_pos does."""
    if table.shape[0] == length:
        return table
    # Without antialiasing, as in PyTorch's interpolate, which MViTv2's code calls.
    resized = interpolate(table.astype(jnp.float32), (length, table.shape[1]), "linear", antialias=False)
    return resized.astype(table.dtype)
