"""PicoDet's necks: path aggregation over the backbone's maps, by LC-PAN or CSP-PAN (Yu et al., 2021).

Modules have PaddleDetection's names.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.batch_norm import LinearNorm
from castling_jax.models.depthwise_separable import Activated, separable, upsample
from castling_jax.models.initializers import scaled_uniform
from castling_jax.models.layers import Layers

KAIMING_UNIFORM = scaled_uniform(2.0, "fan_in")
Map = Float[Array, "batch height width channels"]


class SeparableMix(nnx.Module):
    """LC-PAN's way to mix two concatenated maps: two depthwise-separable convolutions, 2c -> 2c -> c channels."""

    def __init__(self, channels: int, layers: Layers):
        self.blocks = nnx.List(separable(2 * channels, width, layers) for width in (2 * channels, channels))

    def __call__(self, x: Map, *, training: bool) -> Map:
        for block in self.blocks:
            x = block(x, training=training)
        return x


class CspMix(nnx.Module):
    """CSP-PAN's way to mix two concatenated maps: half of the channels go through a block, the other half skip it.

    The block is a 1 x 1 convolution and a depthwise-separable convolution, without a residual.
    """

    def __init__(self, channels: int, layers: Layers):
        half = max(channels // 2, 1)
        self.main_conv = Activated(conv=LinearNorm(2 * channels, half, layers))
        self.short_conv = Activated(conv=LinearNorm(2 * channels, half, layers))
        block = nnx.Dict(conv1=Activated(conv=LinearNorm(half, half, layers)), conv2=separable(half, half, layers))
        # A list of one block, because PaddleDetection's names have the block's number.
        self.blocks = nnx.List([block])
        self.final_conv = Activated(conv=LinearNorm(2 * half, channels, layers))

    def __call__(self, x: Map, *, training: bool) -> Map:
        main, short = self.main_conv(x, training=training), self.short_conv(x, training=training)
        for block in self.blocks:
            main = block.conv2(block.conv1(main, training=training), training=training)
        return self.final_conv(jnp.concatenate([main, short], axis=-1), training=training)


NECKS = {"lc_pan": SeparableMix, "csp_pan": CspMix}


class Pan(nnx.Module):
    """Turns maps at strides 8, 16, 32 and perhaps 64 into maps at 8, 16, 32 and 64 with `channels` channels each.

    The fourth output is a sum: the third output, shrunk, plus the projected third input, shrunk. A backbone with a map
    at stride 64, such as LeViT, replaces the second term with the projection of that map, so that no stage is left out.

    Args:
      channels_in: channels of each input map.
      channels: channels of each output map.
      neck: one of NECKS, the way to mix two concatenated maps.
      layers: makes the layers.
    """

    def __init__(self, channels_in: Sequence[int], channels: int, neck: str, layers: Layers):
        layers = dataclasses.replace(layers, kernel_init=KAIMING_UNIFORM)
        mix = NECKS[neck]
        self.conv_t = nnx.List(Activated(conv=LinearNorm(width, channels, layers)) for width in channels_in)
        self.top_down_blocks = nnx.List(mix(channels, layers) for _ in range(2))
        self.downsamples = nnx.List(separable(channels, channels, layers, stride=2) for _ in range(2))
        self.bottom_up_blocks = nnx.List(mix(channels, layers) for _ in range(2))
        self.first_top_conv = separable(channels, channels, layers, stride=2) if len(channels_in) == 3 else None
        self.second_top_conv = separable(channels, channels, layers, stride=2)

    @jax.named_scope("neck")
    def __call__(self, maps: Sequence[Map], *, training: bool) -> list[Map]:
        p3, p4, p5, *p6 = (conv(x, training=training) for conv, x in zip(self.conv_t, maps, strict=True))

        # Down from the coarsest map, p5, which stays as it is: each finer map is mixed with the result from above it.
        coarse = p5
        top_down = [p5]
        for block, lateral in zip(self.top_down_blocks, (p4, p3), strict=True):
            coarse = block(jnp.concatenate([upsample(coarse), lateral], axis=-1), training=training)
            top_down.append(coarse)

        # And up again, from the finest map to p5: `pop` takes the finest one, which was appended last.
        outputs = [top_down.pop()]
        for downsample, block in zip(self.downsamples, self.bottom_up_blocks, strict=True):
            shrunk = downsample(outputs[-1], training=training)
            outputs.append(block(jnp.concatenate([shrunk, top_down.pop()], axis=-1), training=training))

        top = p6[0] if self.first_top_conv is None else self.first_top_conv(p5, training=training)
        return [*outputs, top + self.second_top_conv(outputs[-1], training=training)]
