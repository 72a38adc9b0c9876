"""Multi-head self-attention in each of the four kinds a backbone can be built with."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax import ops
from castling_jax.models.layers import linear
from castling_jax.ops.angular import normalize_and_convolve
from castling_jax.ops.errors import InputError, check_known

ATTENTIONS = ("castling", "linear_angular", "softmax", "angular")
FORMS = ("train", "inference")
TOKEN_KERNEL_SIZES = {"1d": 9, "2d": 3}  # the authors' block has 9 taps over tokens


def kernel_shape(token_conv: str, size: int | None) -> tuple[int, ...]:
    """The token kernel's shape without its heads; a size of None is the usual one."""
    size = TOKEN_KERNEL_SIZES[token_conv] if size is None else size
    if size % 2 == 0 or size < 1:
        raise InputError(f"token_kernel_size must be odd, so that a tap stands on the token itself, not {size}.")
    return (size,) if token_conv == "1d" else (size, size)


class Attention(nnx.Module):
    """Self-attention with fused qkv: its rows are ordered q, k, v, then head, then head_dim.

    Args:
      dim: width, a multiple of num_heads.
      num_heads: heads.
      attention: one of ATTENTIONS; "angular" is the exact kernel in the place of its linear part.
      form: "inference" leaves out castling's softmax branch; to the other kinds it makes no difference.
      qkv_bias: whether the qkv projection has a bias.
      token_conv: the convolution of the values, of all kinds but softmax: "1d" over tokens, "2d" over the grid, or
        None.
      token_kernel_size: taps, or rows and columns, of that convolution; None is 9 for "1d" and 3 for "2d".
      param_dtype: what its parameters are held in.
      **layer: what else `linear` takes.

    Raises:
      InputError: heads that do not divide the width, an even kernel, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: str,
        form: str,
        qkv_bias: bool,
        token_conv: str | None,
        token_kernel_size: int | None,
        param_dtype: jnp.dtype,
        **layer: Any,
    ):
        check_known("attention", attention, ATTENTIONS)
        check_known("form", form, FORMS)
        if token_conv is not None:
            check_known("token_conv", token_conv, TOKEN_KERNEL_SIZES)
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide the width {dim}.")
        self.num_heads = num_heads
        self.attention = attention
        self.form = form
        self.token_conv = token_conv
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, param_dtype=param_dtype, **layer)
        self.proj = linear(dim, dim, param_dtype=param_dtype, **layer)
        # Zero, so that a converted or new model starts as attention alone.
        self.token_kernel = (
            nnx.Param(jnp.zeros((*kernel_shape(token_conv, token_kernel_size), num_heads), param_dtype))
            if attention != "softmax" and token_conv is not None
            else None
        )

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        grid: tuple[int, int],
        prefix_tokens: int,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, ""]]:
        """The attention's output, and the mask density: the share of softmax weights kept, 0 without the branch."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        out, density = self._attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask_threshold)
        if self.token_kernel is not None and self.token_conv == "2d":
            out += ops.depthwise_convolution(
                qkv[:, :, 2], self.token_kernel[...], grid=grid, prefix_tokens=prefix_tokens
            )
        return self.proj(out.reshape(batch, tokens, channels)), density

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask_threshold: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        no_branch = jnp.zeros((), jnp.float32)
        taps = self.token_kernel[...] if self.token_kernel is not None and self.token_conv == "1d" else None
        if self.attention == "softmax":
            return jax.nn.dot_product_attention(q, k, v), no_branch
        if self.attention == "angular":
            return normalize_and_convolve(ops.angular_attention(q, k, v), v, taps), no_branch
        if self.attention == "linear_angular" or self.form == "inference":
            return ops.linear_angular_attention(q, k, v, taps), no_branch
        if mask_threshold is None:
            raise InputError("a castling model in training form needs mask_threshold, a number of at least 0.")
        return ops.castling_attention(q, k, v, taps, mask_threshold=mask_threshold)
