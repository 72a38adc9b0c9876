"""The attention operations on kernels: which arguments each kernel takes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from castling_jax.errors import InputError
from castling_jax.ops.activations import activate
from castling_jax.ops.around import ChannelNorms, normalize_qkv
from castling_jax.ops.bias import Bias
from castling_jax.ops.depthwise import depthwise_convolution
from castling_jax.ops.kernel_calls import record
from castling_jax.ops.mesh import axes_of_kind
from castling_jax.ops.tokens import MAX_MULTIPLIED, values_of_queries
from castling_jax.ops.tpu import linear_angular, linear_angular_blocks, masked_softmax, masked_softmax_blocks
from castling_jax.ops.tpu.dispatch import check_dtypes, on_platform, over_mesh, split_over_mesh
from castling_jax.ops.tpu.factors import append_factors, join_factors
from castling_jax.ops.tpu.layout import fast_memory_bytes


def linear_angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None,
    query_values: Float[Array, "batch queries heads value_dim"] | None,
    auxiliary: Float[Array, "batch queries heads value_dim"] | None,
    norms: ChannelNorms | None,
    *,
    query_tokens: Int[np.ndarray, "queries"] | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
    activation: str | None,
    fallback: Callable[..., Any] | None,
) -> Float[Array, "batch queries heads value_dim"]:
    """activation(l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V)), fused.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: the taps.
      query_values: the values at the queries' positions; None where `v` has them.
      auxiliary: added before the normalisation.
      norms: batch norm's last step for q, k and v, which the kernel does; None where they are normalised.
      query_tokens: the key tokens on which the queries stand; None where it is all of them.
      grid: (height, width) of the queries, for taps over the grid.
      prefix_tokens: leading queries that the taps leave out.
      activation: a name of ACTIVATIONS, or None.
      fallback: runs instead, with these arrays, where there is no TPU or the kernels do not take them. None raises an
        error instead, and interprets the kernels on a CPU.

    Raises:
      InputError: without `fallback`: dtypes differ, the mesh does not divide batch or heads, or the platform is a GPU.
    """
    arguments = q, k, v, token_kernel, query_values, auxiliary, norms
    try:
        split = split_over_mesh(q, k, v, heads=q.shape[2])
        check_dtypes("q, k and v", q, k, v)
    except InputError:
        if fallback is None:
            raise
        return fallback(*arguments)

    names = "q", "k", "v", "token_kernel", "query_values", "auxiliary", "norms"
    record(
        "linear_angular_attention",
        dict(zip(names, arguments, strict=True)),
        query_tokens=None if query_tokens is None else tuple(query_tokens.tolist()),
        grid=grid,
        prefix_tokens=prefix_tokens,
        activation=activation,
    )

    def run(q, k, v, token_kernel, query_values, auxiliary, norms, *, interpret):
        # The kernel selects tokens by a product, which is dearer than reading them from HBM once there are many keys.
        kernel_tokens = query_tokens if k.shape[1] <= MAX_MULTIPLIED else None
        # The kernels convolve all tokens alike: with prefix tokens, the taps are left to XLA.
        kernel_taps = None if prefix_tokens else token_kernel
        needed = linear_angular.needed_bytes(q, k, v, kernel_taps, query_tokens=kernel_tokens, grid=grid)
        whole = needed <= fast_memory_bytes()
        # A block of tokens sees eight tokens of each neighbour, which is not enough for taps over a grid.
        if not whole and kernel_taps is not None and (grid or len(kernel_taps) > linear_angular_blocks.MAX_TAPS):
            kernel_taps = None
        is_complete = token_kernel is None or kernel_taps is not None
        if norms is not None and not (whole and is_complete and kernel_tokens is query_tokens):
            # Other parts of the program read the values too.
            q, k, v = normalize_qkv(q, k, v, norms)
            norms = None
        values = values_of_queries(v, query_tokens if query_values is None else query_values)
        if kernel_tokens is not query_tokens:
            query_values = values
        if whole:
            out = linear_angular.linear_angular(
                *(q, k, v, query_values, kernel_taps, auxiliary, norms),
                query_tokens=kernel_tokens,
                grid=grid,
                activation=activation if is_complete else None,
                interpret=interpret,
            )
            if is_complete:
                return out
        else:
            out = linear_angular_blocks.linear_angular(q, k, v, values, kernel_taps, auxiliary, interpret=interpret)
        if not is_complete:
            out += depthwise_convolution(values, token_kernel, grid=grid, prefix_tokens=prefix_tokens)
        return activate(out, activation)

    if split is not None:
        mesh, tokens = split
        taps = PartitionSpec(None, tokens[2]) if grid is None else PartitionSpec(None, None, tokens[2])
        of_norms = PartitionSpec(None, tokens[2])
        run = over_mesh(run, mesh, (tokens, tokens, tokens, taps, tokens, tokens, of_norms), tokens)
    return on_platform(run, *arguments, fallback=fallback)


def masked_softmax_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    mask_threshold: ArrayLike,
    bias: Bias | None,
    norms: ChannelNorms | None,
    *,
    return_qkv: bool,
    fallback: Callable[..., Any] | None,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""], tuple[Array, Array, Array]]:
    """The masked softmax branch, fused; its mask density; and q, k and v.

    A factored bias is never expanded: the kernels multiply its factors with ones at each key's row and column.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask_threshold: a scalar.
      bias: dense, or two factors.
      norms: as in `linear_angular_attention`; the returned q, k and v are not normalised.
      return_qkv: whether the caller goes on with the returned q, k and v in place of the arguments. The backward kernel
        then adds its gradients to theirs, which saves a pass over memory for each.
      fallback: as in `linear_angular_attention`.

    Raises:
      InputError: without `fallback`: dtypes differ, the mesh does not divide batch or heads, or the platform is a GPU.
    """
    threshold = jnp.asarray(mask_threshold, jnp.float32)
    try:
        split = split_over_mesh(q, k, v, heads=q.shape[2])
        check_dtypes("q, k and v", q, k, v)
        if bias is not None and not isinstance(bias, tuple | list):  # factors are rounded to q's dtype
            check_dtypes("a dense bias", bias)
    except InputError:
        if fallback is None:
            raise
        return fallback(q, k, v, threshold, bias, norms)
    record("masked_softmax_attention", {"q": q, "k": k, "v": v, "bias": bias, "norms": norms}, return_qkv=return_qkv)
    # A float, because the batch of a pod has more weights than an int32 counts.
    size = float(math.prod(q.shape[:3]) * k.shape[1])
    names = () if split is None else axes_of_kind(split[0], AxisType.Auto)

    def run(q, k, v, threshold, bias, norms, *, interpret):
        out, kept, qkv = _masked_softmax(
            q, k, v, threshold.reshape(1, 1), bias, norms, return_qkv=return_qkv, interpret=interpret
        )
        kept = kept.sum()
        density = (jax.lax.psum(kept, names) if names else kept) / size
        return out.reshape(*q.shape[:3], v.shape[3]), density, qkv

    if split is not None:
        mesh, tokens = split
        biases = jax.tree.map(
            lambda factor: PartitionSpec(None if factor.shape[0] == 1 else tokens[0], tokens[2]), bias
        )
        out_specs = tokens, PartitionSpec(), (tokens, tokens, tokens)
        of_norms = PartitionSpec(None, tokens[2])
        run = over_mesh(run, mesh, (tokens, tokens, tokens, PartitionSpec(), biases, of_norms), out_specs)
    return on_platform(run, q, k, v, threshold, bias, norms, fallback=fallback)


def _masked_softmax(q, k, v, threshold, bias, norms, *, return_qkv: bool, interpret: bool):
    """The output, with heads and channels as one axis; how many weights each part kept; and q, k and v."""
    scale, heads = 1 / math.sqrt(q.shape[3]), q.shape[2]
    dense = factors = sides = None
    if isinstance(bias, tuple | list):
        factors = join_factors(bias[0], bias[1], q.shape[0], q.dtype)
        sides = bias[0].shape[3], bias[1].shape[3]
    elif bias is not None:
        dense = jnp.swapaxes(bias, 2, 3)
    if masked_softmax.needed_bytes(q, k, v, dense, factors) <= fast_memory_bytes():
        out, kept, *returned = masked_softmax.masked_softmax(
            *_flat(q, k, v),
            *(threshold, dense, factors, jax.tree.map(lambda norm: norm.reshape(3, -1), norms)),
            *(heads, scale, interpret, return_qkv, sides),
        )
        if return_qkv:
            q, k, v = (x.reshape(like.shape) for x, like in zip(returned, (q, k, v), strict=True))
        return out, kept, (q, k, v)
    qkv = q, k, v
    q, k, v = normalize_qkv(q, k, v, norms)
    if factors is not None:
        q, k = append_factors(q, k, bias, scale)
        scale = 1.0
    return *masked_softmax_blocks.masked_softmax(*_flat(q, k, v), threshold, dense, heads, scale, interpret), qkv


def _flat(*arrays: jax.Array) -> list[jax.Array]:
    return [x.reshape(*x.shape[:2], -1) for x in arrays]
