"""Multi-head self-attention in each of the four kinds a backbone can be built with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax import ops
from castling_jax.errors import InputError, check_known
from castling_jax.models.layers import linear, split_linear
from castling_jax.ops.angular import normalize_and_convolve
from castling_jax.ops.bias import Bias, dense_bias
from castling_jax.ops.tokens import QueryValues, values_of_queries

ATTENTIONS = ("castling", "linear_angular", "softmax", "angular")
FORMS = ("train", "inference")
TOKEN_KERNEL_SIZES = {"1d": 9, "2d": 3}  # the authors' block has 9 taps over tokens


def kernel_shape(token_conv: str, size: int | None) -> tuple[int, ...]:
    """The token kernel's shape without its heads; a size of None is the usual one."""
    size = TOKEN_KERNEL_SIZES[token_conv] if size is None else size
    if size % 2 == 0:
        raise InputError(f"token_kernel_size must be odd, so that a tap stands on the token itself, not {size}.")
    return (size,) if token_conv == "1d" else (size, size)


def new_token_kernel(
    attention: str, token_conv: str | None, size: int | None, num_heads: int, param_dtype: jnp.dtype
) -> nnx.Param | None:
    """The token kernel of an attention, where it has one: zero, so that a new model starts as attention alone.

    Raises:
      InputError: token_conv is unknown, or the size is even.
    """
    if token_conv is not None:
        check_known("token_conv", token_conv, TOKEN_KERNEL_SIZES)
    if attention == "softmax" or token_conv is None:
        return None
    return nnx.Param(jnp.zeros((*kernel_shape(token_conv, size), num_heads), param_dtype))


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
      implementation: of the operations, as there.
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
        implementation: str = "auto",
        param_dtype: jnp.dtype,
        **layer: Any,
    ):
        check_known("attention", attention, ATTENTIONS)
        check_known("form", form, FORMS)
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide the width {dim}.")
        self.num_heads = num_heads
        self.attention = attention
        self.form = form
        self.token_conv = token_conv
        self.implementation = implementation
        self.qkv = linear(dim, 3 * dim, use_bias=qkv_bias, param_dtype=param_dtype, **layer)
        self.proj = linear(dim, dim, param_dtype=param_dtype, **layer)
        self.token_kernel = new_token_kernel(attention, token_conv, token_kernel_size, num_heads, param_dtype)

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
        with jax.named_scope("qkv"):
            q, k, v = (
                part.reshape(batch, tokens, self.num_heads, channels // self.num_heads)
                for part in split_linear(self.qkv, x, 3)
            )
        out, density = attend(
            q,
            k,
            v,
            None if self.token_kernel is None else self.token_kernel[...],
            attention=self.attention,
            form=self.form,
            mask_threshold=mask_threshold,
            grid=grid,
            prefix_tokens=prefix_tokens,
            implementation=self.implementation,
        )
        with jax.named_scope("proj"):
            return self.proj(out.reshape(batch, tokens, channels)), density


def attend(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None,
    *,
    attention: str,
    form: str,
    mask_threshold: ArrayLike | None,
    bias: Bias | None = None,
    query_values: QueryValues = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """The attention a backbone is built with, between its projections.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: over the tokens or over the queries' grid; not of softmax.
      attention: one of ATTENTIONS.
      form: "inference" leaves out castling's softmax branch.
      mask_threshold: of castling in training form.
      bias: of the scores, where there is a softmax.
      query_values: at the queries' positions, where queries and keys are different tokens; as in `ops`.
      grid: (height, width) of the queries, for a kernel over the grid.
      prefix_tokens: tokens before the grid.
      implementation: of the linear-angular and the masked attention, as in `ops`.

    Returns:
      The output, and the mask density: the share of softmax weights kept, 0 without the branch.

    Raises:
      InputError: a castling model in training form has no threshold; and what the operations raise.
    """
    density = jnp.zeros((), jnp.float32)
    if attention == "softmax":
        return _softmax_attention(q, k, v, bias), density
    where: dict[str, Any] = {"grid": None, "prefix_tokens": 0}
    if token_kernel is not None and token_kernel.ndim == 3:
        where = {"grid": grid, "prefix_tokens": prefix_tokens}
    if attention == "angular":
        own_values = values_of_queries(v, query_values)
        out = normalize_and_convolve(ops.angular_attention(q, k, v), own_values, token_kernel, **where)
    elif attention == "linear_angular" or form == "inference":
        out = ops.linear_angular_attention(
            q, k, v, token_kernel, query_values=query_values, implementation=implementation, **where
        )
    elif mask_threshold is None:
        raise InputError("a castling model in training form needs mask_threshold, a number of at least 0.")
    else:
        out, density = ops.castling_attention(
            q,
            k,
            v,
            token_kernel,
            mask_threshold=mask_threshold,
            bias=bias,
            query_values=query_values,
            implementation=implementation,
            **where,
        )
    return out, density


@jax.named_scope("softmax")
def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None) -> jax.Array:
    dense = None if bias is None else dense_bias(bias)
    if q.shape[3] == v.shape[3]:
        return jax.nn.dot_product_attention(q, k, v, bias=dense)
    # JAX's own takes values of the keys' width alone; LeViT's are two and four times as wide.
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[3])
    weights = jax.nn.softmax(scores if dense is None else scores + dense, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
