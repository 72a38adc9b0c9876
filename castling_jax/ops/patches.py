"""The convolution of patches that do not overlap."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float

from castling_jax.ops.dense import of_all_devices
from castling_jax.ops.mesh import axes_of_kind, mesh_in_use


def convolve_patches(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    strides: Sequence[int],
    padding: str,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Float[Array, "batch patch_rows patch_columns features"]:
    """The `conv_general_dilated` of an `nnx.Conv` whose strides are its kernel's size and divide the image's.

    On a TPU it is a product, except where it is differentiated. XLA's convolution has the images of a batch in the
    lanes of registers: with 8 images of 896 pixels, 15 of 16 lanes stay empty, and the images' copy to that layout took
    a third of DeiT-S's inference. But the product's gradient copies images (docs/kernels.md). Not for forward-mode
    differentiation.
    """

    how = {"precision": precision, "preferred_element_type": preferred_element_type}

    def convolve(images: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **how, **options)

    def multiply(images: Array, kernel: Array) -> Array:
        (batch, height, width, channels), (rows, columns) = images.shape, kernel.shape[:2]
        patches = images.reshape(batch, height // rows, rows, width // columns, columns * channels)
        by_rows = kernel.reshape(rows, columns * channels, -1)
        return jnp.einsum("bhrwc,rcf->bhwf", patches, by_rows, **how)

    @jax.custom_vjp
    def of_patches(images: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(images, kernel, tpu=multiply, default=convolve)

    of_patches.defvjp(functools.partial(jax.vjp, convolve), lambda pullback, d_out: pullback(d_out))
    if axes_of_kind(mesh_in_use((images, kernel)), AxisType.Explicit):
        return convolve(images, kernel)
    return of_patches(images, of_all_devices(kernel, images))
