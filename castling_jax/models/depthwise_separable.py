"""Convolutions with batch norm and Hardswish, the building blocks of PicoDet's neck and head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.batch_norm import BatchNorm, LinearNorm
from castling_jax.models.layers import Layers
from castling_jax.ops.depthwise import convolve_taps

KERNEL_SIZE = 5


class Depthwise(nnx.Module):
    """A depthwise 5 x 5 convolution with zero padding; its bias exists only where batch norm is folded into it."""

    def __init__(self, channels: int, layers: Layers, *, stride: int):
        self.stride = stride
        self.dtype = layers.dtype
        shape = (KERNEL_SIZE, KERNEL_SIZE, 1, channels)
        self.kernel = nnx.Param(layers.kernel_init(layers.rngs.params(), shape, layers.param_dtype))
        self.bias = layers.zeros(channels) if layers.folded else None

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch strided_height strided_width channels"]:
        out = convolve_taps(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)


class DepthwiseNorm(nnx.Module):
    """A depthwise convolution, then batch norm; with folded layers one convolution with a bias."""

    def __init__(self, channels: int, layers: Layers, *, stride: int):
        self.linear = Depthwise(channels, layers, stride=stride)
        self.bn = None if layers.folded else BatchNorm(channels, layers)

    def __call__(self, x, *, training):
        x = self.linear(x)
        return x if self.bn is None else self.bn.normalize(x, training)


class Activated(nnx.Module):
    """Layers with batch norm, one after another, with Hardswish after each. Keywords name the layers in the tree."""

    def __init__(self, **modules: nnx.Module):
        self.names = tuple(modules)
        for name, module in modules.items():
            setattr(self, name, module)

    def __call__(self, x, *, training):
        for name in self.names:
            x = jax.nn.hard_swish(getattr(self, name)(x, training=training))
        return x


def separable(features_in: int, features_out: int, layers: Layers, *, stride: int = 1) -> Activated:
    """A depthwise convolution and a 1 x 1 convolution, each with batch norm and Hardswish."""
    return Activated(
        depthwise=DepthwiseNorm(features_in, layers, stride=stride),
        pointwise=LinearNorm(features_in, features_out, layers),
    )


def upsample(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns channels"]:
    """Doubles rows and columns: each position becomes 2 x 2 equal positions."""
    batch, height, width, channels = x.shape
    # A broadcast, whose gradient is a sum over two axes; jax.image.resize would gather.
    spread = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return spread.reshape(batch, 2 * height, 2 * width, channels)
