"""Means and mean squares of channels, which batch norm needs, of any arrays and of a dense layer's results."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float

from castling_jax.ops.dense import SUBLANES, dense, of_all_devices
from castling_jax.ops.mesh import axes_of_kind, mesh_in_use


class Statistics(NamedTuple):
    """Of each channel over all tokens, in float32.

    Attributes:
      mean: the mean.
      mean_square: the mean of the squares.
    """

    mean: Float[Array, " channels"]
    mean_square: Float[Array, " channels"]


def channel_statistics(parts: Sequence[Float[Array, "*batch _"]]) -> Statistics:
    """The statistics of channels that come in parts, in order."""
    wide = [part.astype(jnp.float32) for part in parts]
    tokens = tuple(range(parts[0].ndim - 1))
    mean = jnp.concatenate([jnp.mean(x, tokens) for x in wide])
    return Statistics(mean, jnp.concatenate([jnp.mean(jnp.square(x), tokens) for x in wide]))


def dense_with_statistics(
    x: Float[Array, "*batch channels"], kernels: Sequence[Float[Array, "channels _"]]
) -> tuple[list[Float[Array, "*batch _"]], Statistics]:
    """x @ kernel for each kernel, and the statistics of these results. Not for forward-mode differentiation.

    With y = x @ kernel, batch norm's gradient is d_y - a - y * c, with numbers a and c for each channel. As an operand
    of products it would be written to memory first. On a TPU the products take d_y and x instead:

        x^T (y * c) = (x^T x) (kernel * c)    and    (y * c) kernel^T = x ((kernel * c) kernel^T).

    Elsewhere the gradient is JAX's own.
    """
    if axes_of_kind(mesh_in_use((x, *kernels)), AxisType.Explicit):
        return _results(x, kernels)
    return _with_own_gradient(x, [of_all_devices(kernel, x) for kernel in kernels])


Results = tuple[list[Array], Statistics]
Kept = tuple[Array, list[Array], list[Array]]  # x, the kernels and the results


def _results(x: Array, kernels: Sequence[Array]) -> Results:
    parts = [dense(x, kernel) for kernel in kernels]
    return parts, channel_statistics(parts)


@jax.custom_vjp
def _with_own_gradient(x: Array, kernels: list[Array]) -> Results:
    return _results(x, kernels)


def _compute_and_keep(x: Array, kernels: list[Array]) -> tuple[Results, Kept]:
    parts, statistics = _results(x, kernels)
    return (parts, statistics), (x, kernels, parts)


def _gradients(kept: Kept, d_results: Results) -> tuple[Array, list[Array]]:
    return jax.lax.platform_dependent(*kept, d_results, tpu=_by_products, default=_by_jax)


_with_own_gradient.defvjp(_compute_and_keep, _gradients)


def _by_jax(x: Array, kernels: list[Array], parts: list[Array], d_results: Results) -> tuple[Array, list[Array]]:
    d_parts, d_statistics = d_results
    # From the results that are kept: the gradient of `_results` would compute them again.
    (d_of_statistics,) = jax.vjp(channel_statistics, parts)[1](d_statistics)
    _, pullback = jax.vjp(lambda x, kernels: [dense(x, kernel) for kernel in kernels], x, kernels)
    return pullback(jax.tree.map(jnp.add, d_parts, d_of_statistics))


def _by_products(x: Array, kernels: list[Array], parts: list[Array], d_results: Results) -> tuple[Array, list[Array]]:
    d_parts, d_statistics = d_results
    batch = tuple(range(x.ndim - 1))
    tokens = x.size // x.shape[-1]
    kernel = jnp.concatenate(kernels, 1).astype(jnp.float32)
    scaled = kernel * (2 / tokens * d_statistics.mean_square)
    d_mean = d_statistics.mean / tokens
    # The small products are as exact as the elementwise differences that they replace.
    exactly = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def over_tokens(y: Array) -> Array:
        # In float32, because the sum of the three terms below cancels most of each.
        return jnp.tensordot(x, y, (batch, batch), preferred_element_type=jnp.float32)

    # Of x, which lies in memory, a product with ones costs less than a sum; and a TPU rounds x as in the other terms.
    total = over_tokens(jnp.ones((*x.shape[:-1], SUBLANES), x.dtype))[:, 0]
    d_kernel = (
        jnp.concatenate([over_tokens(d_part) for d_part in d_parts], 1)
        + jnp.outer(total, d_mean)
        + exactly(over_tokens(x), scaled)
    )
    d_x = x @ exactly(scaled, kernel.T).astype(x.dtype) + exactly(kernel, d_mean).astype(x.dtype)
    for d_part, part_kernel in zip(d_parts, kernels, strict=True):
        d_x += d_part @ part_kernel.T
    edges = np.cumsum([part.shape[1] for part in kernels])[:-1].tolist()
    return d_x, [part.astype(kernels[0].dtype) for part in jnp.split(d_kernel, edges, 1)]
