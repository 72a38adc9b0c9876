"""The product of a dense layer, with a gradient that is fast on a CPU."""

import functools
from typing import Any

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from castling_jax.ops.mesh import axes_of_kind, mesh_in_use

# Rows of a TPU's register. With fewer ones, the compiler turns a product with ones back into a reduction.
SUBLANES = 8


def dense(
    x: Float[Array, "*batch channels"],
    kernel: Float[Array, "channels features"],
    dimension_numbers: Any = None,
    precision: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "*batch features"]:
    """x @ kernel, as the `dot_general` of `nnx.Linear`. Not for forward-mode differentiation.

    For the kernel's gradient JAX multiplies the transposed gradient of the output with x. XLA:CPU writes that transpose
    from whatever computes the gradient, number by number, which took a third of a DeiT's training step on a CPU
    (docs/performance.md). There the gradient is one product over all rows instead. On other platforms, on several
    devices and on Explicit axes it is JAX's own.
    """
    del dimension_numbers  # always those of x @ kernel
    product = functools.partial(_plain, precision=precision, out_sharding=out_sharding)
    mesh = mesh_in_use((x, kernel))
    if mesh.size > 1 or axes_of_kind(mesh, AxisType.Explicit):
        return product(x, kernel)
    return _by_rows(x, of_all_devices(kernel, x), precision)


def of_all_devices(parameter: Array, x: Array) -> Array:
    """A parameter that all devices share, for a function with a gradient of its own.

    Inside a shard_map that tracks varying values, x has other values on each device; so has the parameter's gradient,
    until it is summed.
    """
    varying = jax.typeof(x).manual_axis_type.varying - jax.typeof(parameter).manual_axis_type.varying
    return jax.lax.pcast(parameter, tuple(varying), to="varying") if varying else parameter


def _plain(x: Array, kernel: Array, precision: Any, out_sharding: Any = None) -> Array:
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, out_sharding=out_sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_rows(x: Array, kernel: Array, precision: Any) -> Array:
    return _plain(x, kernel, precision)


def _multiply_and_keep(x: Array, kernel: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, kernel, precision), (x, kernel)


def _gradients(precision: Any, kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    def by_rows(x: Array, kernel: Array, d_out: Array) -> tuple[Array, Array]:
        _, pullback = jax.vjp(lambda x: _plain(x, kernel, precision), x)
        rows, d_rows = (array.reshape(-1, array.shape[-1]) for array in (x, d_out))
        return *pullback(d_out), jax.lax.dot_general(rows, d_rows, (((0,), (0,)), ((), ())), precision=precision)

    def by_jax(x: Array, kernel: Array, d_out: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(_plain, precision=precision), x, kernel)[1](d_out)

    return jax.lax.platform_dependent(*kept, d_out, cpu=by_rows, default=by_jax)


_by_rows.defvjp(_multiply_and_keep, _gradients)
