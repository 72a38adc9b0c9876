"""The kernels as the public operations call them: what they serve, where they run, and over which mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from castling_jax.errors import InputError
from castling_jax.ops.bias import Bias
from castling_jax.ops.depthwise import depthwise_convolution
from castling_jax.ops.kernel_calls import record
from castling_jax.ops.mesh import HEAD_AXES, axes_of_kind, mesh_in_use
from castling_jax.ops.tokens import MAX_MULTIPLIED, values_of_queries
from castling_jax.ops.tpu import linear_angular, linear_angular_blocks, masked_softmax, masked_softmax_blocks
from castling_jax.ops.tpu.factors import append_factors, join_factors
from castling_jax.ops.tpu.layout import fast_memory_bytes

INSTEAD = 'use implementation="xla", which serves all'


def linear_angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None,
    query_values: Float[Array, "batch queries heads value_dim"] | None,
    auxiliary: Float[Array, "batch queries heads value_dim"] | None,
    *,
    query_tokens: Int[np.ndarray, "queries"] | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
    otherwise: Callable[..., Any] | None,
) -> Float[Array, "batch queries heads value_dim"]:
    """l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), fused.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: of the values.
      query_values: the values at the queries' positions; None where `v` has them.
      auxiliary: what is added before the normalisation.
      query_tokens: those of the keys' tokens that the queries stand on; None where it is all of them.
      grid: (height, width) of the queries, for a token kernel over the grid.
      prefix_tokens: leading queries that the token kernel leaves out.
      otherwise: what to run, with these arguments, where there is no TPU or the kernels do not serve them; None
        refuses instead, and interprets the kernel on a CPU.

    Raises:
      InputError: with no `otherwise`: dtypes differ, the mesh does not divide batch or heads, or the platform is a GPU.
    """
    arguments = q, k, v, token_kernel, query_values, auxiliary
    try:
        split = _split_over_mesh(q, k, v)
        _check_arrays(q, k, v)
    except InputError:
        if otherwise is None:
            raise
        return otherwise(*arguments)

    record(
        "linear_angular_attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "token_kernel": token_kernel,
            "query_values": query_values,
            "auxiliary": auxiliary,
        },
        query_tokens=None if query_tokens is None else tuple(query_tokens.tolist()),
        grid=grid,
        prefix_tokens=prefix_tokens,
    )

    def run(q, k, v, token_kernel, query_values, auxiliary, *, interpret):
        own_values = values_of_queries(v, query_tokens if query_values is None else query_values)
        selected = query_tokens if k.shape[1] <= MAX_MULTIPLIED else None
        if query_tokens is not None and selected is None:
            query_values = own_values
        inside = None if prefix_tokens else token_kernel
        needed = linear_angular.needed_bytes(q, k, v, inside, query_tokens=selected, grid=grid)
        whole = needed <= fast_memory_bytes()
        # Blocks see no more than eight tokens of their neighbours, which is not enough for a grid.
        if not whole and inside is not None and (grid or len(inside) > linear_angular_blocks.MAX_TAPS):
            inside = None
        if whole:
            out = linear_angular.linear_angular(
                q, k, v, query_values, inside, auxiliary, query_tokens=selected, grid=grid, interpret=interpret
            )
        else:
            out = linear_angular_blocks.linear_angular(q, k, v, own_values, inside, auxiliary, interpret=interpret)
        if token_kernel is None or inside is not None:
            return out
        return out + depthwise_convolution(own_values, token_kernel, grid=grid, prefix_tokens=prefix_tokens)

    if split is not None:
        mesh, tokens = split
        taps = PartitionSpec(None, tokens[2]) if grid is None else PartitionSpec(None, None, tokens[2])
        run = _over_mesh(run, mesh, (tokens, tokens, tokens, taps, tokens, tokens), tokens)
    return _on_platform(run, *arguments, otherwise=otherwise)


def masked_softmax_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    mask_threshold: ArrayLike,
    bias: Bias | None,
    *,
    return_qkv: bool,
    otherwise: Callable[..., Any] | None,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""], tuple[Array, Array, Array]]:
    """The masked softmax branch, fused, its mask density, and q, k and v.

    A bias in two factors is never expanded: it is their product with ones where a key lies in that row or column.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask_threshold: a scalar.
      bias: dense, or two factors.
      return_qkv: that q, k and v are gone on with as returned, not as given: the kernel then adds their gradients.
      otherwise: as in `linear_angular_attention`.

    Raises:
      InputError: with no `otherwise`: dtypes differ, the mesh does not divide batch or heads, or the platform is a GPU.
    """
    threshold = jnp.asarray(mask_threshold, jnp.float32)
    try:
        split = _split_over_mesh(q, k, v)
        _check_arrays(q, k, v)
    except InputError:
        if otherwise is None:
            raise
        return otherwise(q, k, v, threshold, bias)
    record("masked_softmax_attention", {"q": q, "k": k, "v": v, "bias": bias}, return_qkv=return_qkv)
    # A float: the batch of a pod has more weights than an int32 counts.
    size = float(math.prod(q.shape[:3]) * k.shape[1])
    names = () if split is None else axes_of_kind(split[0], AxisType.Auto)

    def run(q, k, v, threshold, bias, *, interpret):
        out, kept, on = _masked_softmax(
            q, k, v, threshold.reshape(1, 1), bias, return_qkv=return_qkv, interpret=interpret
        )
        kept = kept.sum()
        density = (jax.lax.psum(kept, names) if names else kept) / size
        return out.reshape(*q.shape[:3], v.shape[3]), density, on

    if split is not None:
        mesh, tokens = split
        biases = jax.tree.map(
            lambda factor: PartitionSpec(None if factor.shape[0] == 1 else tokens[0], tokens[2]), bias
        )
        out_specs = tokens, PartitionSpec(), (tokens, tokens, tokens)
        run = _over_mesh(run, mesh, (tokens, tokens, tokens, PartitionSpec(), biases), out_specs)
    return _on_platform(run, q, k, v, threshold, bias, otherwise=otherwise)


def _masked_softmax(q, k, v, threshold, bias, *, return_qkv: bool, interpret: bool):
    """The output, flat; weights kept, of some parts; and q, k and v to go on with."""
    scale, heads = 1 / math.sqrt(q.shape[3]), q.shape[2]
    dense = factors = sides = None
    if isinstance(bias, tuple | list):
        factors = join_factors(bias[0], bias[1], q.shape[0], q.dtype)
        sides = bias[0].shape[3], bias[1].shape[3]
    elif bias is not None:
        dense = jnp.swapaxes(bias, 2, 3)
    if masked_softmax.needed_bytes(q, k, v, dense, factors) <= fast_memory_bytes():
        out, kept, *on = masked_softmax.masked_softmax(
            *_flat(q, k, v), threshold, dense, factors, heads, scale, interpret, return_qkv, sides
        )
        on = [x.reshape(like.shape) for x, like in zip(on, (q, k, v), strict=True)] if return_qkv else [q, k, v]
        return out, kept, tuple(on)
    given = q, k, v
    if factors is not None:
        q, k = append_factors(q, k, bias, scale)
        scale = 1.0
    return *masked_softmax_blocks.masked_softmax(*_flat(q, k, v), threshold, dense, heads, scale, interpret), given


def _flat(*arrays: jax.Array) -> list[jax.Array]:
    return [x.reshape(*x.shape[:2], -1) for x in arrays]


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if any(jax.typeof(x).manual_axis_type.varying for x in (q, k, v)):
        raise InputError(f"the kernels serve a jax.shard_map with check_vma=False alone: give it that, or {INSTEAD}.")
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise InputError(
            f"the kernels serve float32 or bfloat16, one for all, not {', '.join(sorted(dtypes))}: {INSTEAD}."
        )


def _split_over_mesh(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Mesh | AbstractMesh, PartitionSpec] | None:
    """The mesh in use, and how [batch, tokens, heads, dim] is split over it; None where nothing is to be split.

    Axes that are Manual, inside a shard_map, have split the arrays already and are left out.
    """
    mesh = mesh_in_use((q, k, v))
    free = axes_of_kind(mesh, AxisType.Auto)
    if not free:
        return None
    if not _can_split_over(mesh, free):
        raise InputError(
            f"jax.vmap maps a dimension that the mesh splits, and the kernels need its axes {', '.join(free)} for the "
            f"batch and heads: map a dimension that is not split, or {INSTEAD}."
        )
    head_axes = tuple(name for name in free if name in HEAD_AXES)
    batch_axes = tuple(name for name in free if name not in HEAD_AXES)
    for what, size, axes in (("batch", q.shape[0], batch_axes), ("heads", q.shape[2], head_axes)):
        parts = math.prod(mesh.shape[name] for name in axes)
        if size % parts:
            raise InputError(
                f"the mesh splits the {what} in {parts} (its axes {', '.join(axes)}), which does not divide {size}: "
                f"choose another mesh or {what}, or {INSTEAD}."
            )
    return mesh, PartitionSpec(batch_axes, None, head_axes)


def _can_split_over(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> bool:
    """False under a vmap of a dimension that was split over one of the axes: only shard_map tells, by refusing them."""
    size, spec = math.prod(mesh.shape[name] for name in axes), PartitionSpec(axes)
    try:
        jax.eval_shape(
            jax.shard_map(lambda x: x, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
            jax.ShapeDtypeStruct((size,), jnp.float32),
        )
    except ValueError:
        return False
    return True


def _over_mesh(run: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on each device's part of the batch and of the heads: the compiler cannot split a kernel by itself."""

    def sharded(*arguments, interpret):
        # A specification for what is None would not fit the arguments' tree.
        specs = tuple(None if x is None else spec for x, spec in zip(arguments, in_specs, strict=True))
        part = functools.partial(run, interpret=interpret)
        # Pallas does not say over which axes its outputs vary, which the check would need.
        part = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        # Compiled also where the caller is not: by itself shard_map would take the mesh with its axes' former types.
        return jax.jit(part)(*arguments)

    return sharded


def _on_platform(kernel: Callable[..., Any], *arguments: Any, otherwise: Callable[..., Any] | None) -> Any:
    """Runs the kernel for the platform that is lowered for: Mosaic on a TPU; elsewhere `otherwise`, or interpreted."""

    def on_tpu(*arguments):
        return kernel(*arguments, interpret=False)

    if otherwise is not None:
        return jax.lax.platform_dependent(*arguments, tpu=on_tpu, default=otherwise)
    if jax.default_backend() == "gpu":
        raise InputError(f'implementation="pallas" is for TPUs, and this is a GPU: {INSTEAD}.')
    return jax.lax.platform_dependent(*arguments, tpu=on_tpu, cpu=lambda *arguments: kernel(*arguments, interpret=True))
