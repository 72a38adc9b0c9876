"""Depthwise convolution of the values over tokens or over the patch grid (Castling-ViT, section 4.2)."""

import functools
import math
from collections.abc import Sequence
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from castling_jax.errors import InputError, check, check_between
from castling_jax.ops.checks import check_array
from castling_jax.ops.mesh import HEAD_AXES, mesh_in_use, on_auto_axes, split_as

SUMMED = 4  # a kernel's gradient on a CPU adds SUMMED x SUMMED products elementwise before it reduces them


@on_auto_axes(lambda v: split_as(v, 0, 1, 2, 3))
@jax.named_scope("token_kernel")
def depthwise_convolution(
    v: Float[Array, "batch tokens heads value_dim"],
    kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"],
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> Float[Array, "batch tokens heads value_dim"]:
    """Convolves the values with taps that all channels of a head share, with zeros beyond the ends.

    The kernel is not flipped, as is usual in deep learning, and its middle tap stands on the token itself.

    Args:
      v: values.
      kernel: [taps, heads] over the token axis, or [rows, columns, heads] over the patch grid, of odd sizes.
      grid: (height, width) of the patch grid in tokens, for a [rows, columns, heads] kernel only.
      prefix_tokens: number of leading tokens (class, distillation) that no tap reads or writes.

    Returns:
      The convolved values in v's dtype, zero at the prefix tokens.

    Raises:
      InputError: the kernel has an even size or another number of heads, or the grid is missing or does not fit.
    """
    check_array("v", v, ("batch", "tokens", "heads", "value_dim"))
    check_token_kernel(kernel, v.shape[1], v.shape[2], grid, prefix_tokens)
    tokens = v.shape[1] - prefix_tokens
    sizes = (tokens,) if grid is None else tuple(grid)
    patches = v[:, prefix_tokens:].reshape(v.shape[0], *sizes, *v.shape[2:])
    out = _depthwise_taps(patches, kernel).reshape(v.shape[0], tokens, *v.shape[2:])
    return jnp.pad(out, ((0, 0), (prefix_tokens, 0), (0, 0), (0, 0)))


def check_token_kernel(
    kernel: jax.Array, all_tokens: int, heads: int, grid: tuple[int, int] | None, prefix_tokens: int
) -> None:
    """Raises an InputError unless the kernel, grid and prefix fit values with `all_tokens` tokens and `heads` heads."""
    check_array("token_kernel", kernel)
    taps = kernel.shape[:-1]
    check(
        len(taps) in (1, 2) and all(size % 2 for size in taps),
        f"a token kernel must be [taps, heads] or [rows, columns, heads] of odd sizes, not {kernel.shape}.",
    )
    check(kernel.shape[-1] == heads, f"a token kernel of shape {kernel.shape} does not fit values with {heads} heads.")
    if not all(isinstance(size, int | np.integer) for size in (*jax.tree.leaves(grid), prefix_tokens)):
        raise InputError(f"grid and prefix_tokens must be integers, not {grid!r} and {prefix_tokens!r}.")
    check_between("prefix_tokens", prefix_tokens, 0, all_tokens)
    check(
        (grid is None) == (len(taps) == 1),
        f"only a [rows, columns, heads] kernel needs a grid=(height, width), not {kernel.shape} with grid={grid}.",
    )
    tokens = all_tokens - prefix_tokens
    if grid is not None and (np.shape(grid) != (2,) or min(grid) < 0 or math.prod(grid) != tokens):
        raise InputError(f"a grid of {grid} does not hold the {tokens} tokens after {prefix_tokens} prefix tokens.")


# jit keeps this function's name in the jaxpr, by which models/macs.py counts its multiply-adds.
@jax.jit
def _depthwise_taps(patches: jax.Array, kernel: jax.Array) -> jax.Array:
    # By the compiler's estimate for a TPU, XLA's convolution and its gradients take a seventh of the time of shifted
    # multiply-adds. Elsewhere a convolution with one channel per group is slow.
    return jax.lax.platform_dependent(patches, kernel, tpu=_convolution, default=_shifted_taps)


def _convolution(patches: jax.Array, kernel: jax.Array) -> jax.Array:
    *_, heads, dim = patches.shape
    *taps, _ = kernel.shape
    channels = patches.reshape(*patches.shape[:-2], heads * dim)
    repeated = jnp.repeat(kernel.astype(patches.dtype), dim, axis=-1).reshape(*taps, 1, heads * dim)
    # HIGHEST, because the default precision would round float32 values to bfloat16.
    out = convolve_channels(channels, repeated, (1,) * len(taps), precision=jax.lax.Precision.HIGHEST)
    return out.reshape(patches.shape)


def _shifted_taps(patches: jax.Array, kernel: jax.Array) -> jax.Array:
    # Shifted multiply-adds fuse into one loop, and so do their gradients.
    batch, *sizes, heads, dim = patches.shape
    *taps, _ = kernel.shape
    wide = jnp.promote_types(patches.dtype, jnp.float32)
    # With heads and channels as one axis a CPU works on whole vectors, and does not copy the array for every tap.
    channels = patches.reshape(batch, *sizes, heads * dim)
    padded = jnp.pad(channels, [(0, 0), *((size // 2, size // 2) for size in taps), (0, 0)]).astype(wide)
    kernel = kernel.astype(wide)[..., None]
    total = jnp.zeros(channels.shape, wide)
    for offset in product(*map(range, taps)):
        window = tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
        # Each tap is broadcast to the whole array, so that its gradient is one sum down to the heads. Devices then
        # exchange one number per head instead of one per channel.
        tap = jnp.broadcast_to(kernel[offset], patches.shape).reshape(channels.shape)
        total += padded[(slice(None), *window)] * tap
    return total.reshape(patches.shape).astype(patches.dtype)


def convolve_channels(
    x: Float[Array, "batch *sizes channels"],
    kernel: Float[Array, "*taps 1 channels"],
    strides: tuple[int, ...],
    *,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "batch *strided channels"]:
    """XLA's convolution of each channel with its own taps, in odd numbers, with zero padding by half the taps.

    XLA's partitioner (JAX 0.10 to 0.12) has a fault: if one axis of a mesh splits the batch and another axis does not
    split `x`, it multiplies the kernel's gradient by the number of devices along the other axis. Axes named `tensor` or
    `model` may be such axes. On a mesh with one of them, the gradient is a sum of products instead of a convolution,
    which is correct, but slower on a TPU.
    """
    sizes = mesh_in_use((x, kernel)).shape
    split = any(sizes.get(name, 1) > 1 for name in HEAD_AXES)
    return (_convolve_in_parts if split else _convolve)(x, kernel, strides, precision)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], precision: jax.lax.Precision | None
) -> jax.Array:
    axes = "HW"[: len(strides)]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=[(size // 2, size // 2) for size in kernel.shape[:-2]],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


_convolve_in_parts = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _convolve_and_keep(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], precision: jax.lax.Precision | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, precision), (x, kernel)


def _convolution_gradients(
    strides: tuple[int, ...],
    precision: jax.lax.Precision | None,
    kept: tuple[jax.Array, jax.Array],
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    _, backward = jax.vjp(lambda x: _convolve(x, kernel, strides, precision), x)
    *taps, _, _ = kernel.shape
    padded = jnp.pad(x, [(0, 0), *((size // 2, size // 2) for size in taps), (0, 0)]).astype(jnp.float32)
    d_taps = []
    for offset in product(*map(range, taps)):
        window = (
            slice(start, start + stride * size, stride)
            for start, stride, size in zip(offset, strides, d_out.shape[1:-1], strict=True)
        )
        # Rounded once, at the end: the sum runs over the batch and all positions.
        d_taps.append(jnp.sum(padded[(slice(None), *window)] * d_out, axis=tuple(range(d_out.ndim - 1))))
    return *backward(d_out), jnp.stack(d_taps).reshape(kernel.shape).astype(kernel.dtype)


_convolve_in_parts.defvjp(_convolve_and_keep, _convolution_gradients)


# jit keeps this function's name in the jaxpr, by which models/macs.py counts its multiply-adds.
@functools.partial(jax.jit, static_argnums=2)
def convolve_taps(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns 1 channels"],
    stride: int,
) -> Float[Array, "batch strided_height strided_width channels"]:
    """`convolve_channels` over a grid with one stride, fast on each platform. Not for forward-mode differentiation.

    XLA has a depthwise convolution for TPUs. XLA's convolution on a CPU takes more than ten times as long as shifted
    multiply-adds with gradients of their own (docs/performance.md).
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        tpu=lambda x, kernel: convolve_channels(x, kernel, (stride, stride)),
        default=lambda x, kernel: _shift_and_add(x, kernel, stride),
    )


def _every(x: jax.Array, starts: Sequence[int], stride: int, sizes: Sequence[int]) -> jax.Array:
    """Every stride-th row and column of an image from `starts` on, `sizes` of them."""
    (row, column), (rows, columns) = starts, sizes
    ends = (x.shape[0], row + stride * (rows - 1) + 1, column + stride * (columns - 1) + 1, x.shape[3])
    return jax.lax.slice(x, (0, row, column, 0), ends, (1, stride, stride, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shift_and_add(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    *taps, _, _ = kernel.shape
    sizes = (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x, [(0, 0), *((size // 2, size // 2) for size in taps), (0, 0)]).astype(wide)
    # Without the barrier XLA fuses the padding into the loop over the taps, which then tests each number for padding.
    padded = jax.lax.optimization_barrier(padded)
    offsets = product(*map(range, taps))
    products = (_every(padded, offset, stride, sizes) * kernel[(*offset, 0)].astype(wide) for offset in offsets)
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _shift_and_keep(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shift_and_add(x, kernel, stride), (x, kernel)


def _shift_gradients(stride: int, kept: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of input and kernel: a convolution with the reversed kernel, and for each tap a sum of products.

    XLA's reductions on a CPU take one number at a time, so SUMMED x SUMMED products are added elementwise first.
    """
    x, kernel = kept
    *taps, _, _ = kernel.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Zeros between the rows and columns of a strided result expand it to the input's size: the stride is then 1.
    spread = [(0, x.shape[axis] - stride * (d_out.shape[axis] - 1) - 1, stride - 1) for axis in (1, 2)]
    dilated = jax.lax.pad(d_out, jnp.zeros((), d_out.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    d_x = _shift_and_add(dilated, kernel[::-1, ::-1], 1)

    # The result is padded with zeros to whole blocks of SUMMED x SUMMED positions, and the input as far as a tap reads.
    blocks = tuple(-(-size // SUMMED) for size in d_out.shape[1:3])
    whole = [SUMMED * size for size in blocks]
    ends = [(0, size - length) for size, length in zip(whole, d_out.shape[1:3], strict=True)]
    edges = [
        (size // 2, max(stride * (length - 1) + size - size // 2 - given, 0))
        for size, length, given in zip(taps, whole, x.shape[1:3], strict=True)
    ]
    d_out = jax.lax.optimization_barrier(jnp.pad(d_out, [(0, 0), *ends, (0, 0)]).astype(wide))
    padded = jax.lax.optimization_barrier(jnp.pad(x, [(0, 0), *edges, (0, 0)]).astype(wide))
    parts = {at: _every(d_out, at, SUMMED, blocks) for at in product(range(SUMMED), repeat=2)}
    d_taps = []
    for offset in product(*map(range, taps)):
        # Position and tap make one slice: XLA would copy the outer of two nested slices for each tap. Products and sums
        # are lax's, because there are hundreds of them: jnp's take a multiple of the time to trace.
        read = {at: (offset[0] + stride * at[0], offset[1] + stride * at[1]) for at in parts}
        products = (jax.lax.mul(_every(padded, read[at], stride * SUMMED, blocks), part) for at, part in parts.items())
        d_taps.append(functools.reduce(jax.lax.add, products))
    summed = jax.lax.optimization_barrier(jnp.stack(d_taps)).sum((1, 2, 3))
    return d_x, summed.reshape(kernel.shape).astype(kernel.dtype)


_shift_and_add.defvjp(_shift_and_keep, _shift_gradients)
