"""Multi-head self-attention, as plain transformers have it."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.errors import InputError
from castling_jax.models.attention.kinds import Core
from castling_jax.models.layers import Layers, split_linear


class MultiHeadAttention(nnx.Module):
    """Self-attention with fused qkv, whose rows are ordered q, k, v, then head, then head_dim.

    Args:
      dim: width, a multiple of num_heads.
      num_heads: heads.
      core: the attention between the projections.
      layers: makes the layers.
      qkv_bias: whether the qkv projection has a bias.

    Raises:
      InputError: the heads do not divide the width.
    """

    token_kernel: nnx.Param | None

    def __init__(self, dim: int, num_heads: int, core: Core, layers: Layers, *, qkv_bias: bool):
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide the width {dim}.")
        self.num_heads = num_heads
        self.key_dim = self.value_dim = dim // num_heads
        self.core = core
        self.qkv = layers.linear(dim, 3 * dim, use_bias=qkv_bias)
        self.proj = layers.linear(dim, dim)
        core.add_parameters(self, layers)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        grid: tuple[int, int],
        prefix_tokens: int,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, ""]]:
        """The output and the mask density; `grid` is (height, width) of the tokens after the prefix tokens."""
        with jax.named_scope("qkv"):
            q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in split_linear(self.qkv, x, 3))
        where: dict[str, Any] = {"grid": grid, "prefix_tokens": prefix_tokens}
        out, density = self.core.kind(q, k, v, mask_threshold=mask_threshold, **where, **self.core.inputs_of(self))
        with jax.named_scope("proj"):
            return self.proj(out.reshape(x.shape)), density
