"""Resizes learned position embeddings to other patch grids."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.errors import InputError


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
    resized = jax.image.resize(
        patches.reshape(1, *old_grid, channels).astype(jnp.float32), (1, *new_grid, channels), "cubic"
    )
    return jnp.concatenate([prefix, resized.reshape(1, -1, channels).astype(embedding.dtype)], axis=1)


def resize_relative_positions(
    table: Float[Array, "distances channels"], length: int
) -> Float[Array, "length channels"]:
    """Interpolates a table of relative positions linearly to `length` distances, as MViTv2's get_rel_pos does."""
    if table.shape[0] == length:
        return table
    # Without antialiasing, as in PyTorch's interpolate, which MViTv2's code calls.
    resized = jax.image.resize(table.astype(jnp.float32), (length, table.shape[1]), "linear", antialias=False)
    return resized.astype(table.dtype)
