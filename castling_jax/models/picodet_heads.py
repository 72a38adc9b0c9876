"""PicoDet's heads, one a level: that of the second version, and the legacy one (Yu et al., 2021).

A head turns a map into class scores and box bins: the logits of four distributions over distances, left, top, right and
bottom.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.box_bins import BINS, SIDES
from castling_jax.models.layers import ConvNorm, Layers, LinearNorm
from castling_jax.models.pan import KAIMING_UNIFORM
from castling_jax.models.separable import KERNEL_SIZE, Separable

HEAD_INIT = jax.nn.initializers.normal(0.01)
RARE = jax.nn.initializers.constant(-math.log(99))  # a probability of .01, as most points see no object
SCORE_EPSILON = 1e-9
Map = Float[Array, "batch height width channels"]


class Body(nnx.Module):
    """Depthwise-separable convolutions of a level's own."""

    def __init__(self, channels: int, num_convs: int, layers: Layers):
        self.convs = nnx.List(Separable(channels, channels, layers, kernel_init=HEAD_INIT) for _ in range(num_convs))

    def __call__(self, x: Map, *, training: bool) -> Map:
        for conv in self.convs:
            x = conv(x, training=training)
        return x


class Excitation(nnx.Module):
    """Scales the channels by what their means say, then a 1 x 1 convolution with batch norm and Hardswish."""

    def __init__(self, channels: int, layers: Layers):
        self.fc = dataclasses.replace(layers, init_std=0.001).linear(channels, channels)
        self.conv = LinearNorm(channels, channels, layers, kernel_init=HEAD_INIT)

    def __call__(self, x: Map, *, training: bool) -> Map:
        gate = jax.nn.sigmoid(self.fc(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return jax.nn.hard_swish(self.conv(x * gate, training=training))


class Alignment(nnx.Module):
    """The logit of how well classification and box agree: a dense 5 x 5 convolution to one channel, then 1 x 1."""

    def __init__(self, channels: int, layers: Layers):
        init = KAIMING_UNIFORM
        self.dense = ConvNorm(channels, 1, layers, kernel_size=KERNEL_SIZE, stride=1, kernel_init=init)
        self.pointwise = LinearNorm(1, 1, layers, kernel_init=init)

    def __call__(self, x: Map, *, training: bool) -> Map:
        return self.pointwise(jax.nn.hard_swish(self.dense(x, training=training)), training=training)


class Head(nnx.Module):
    """The second version's head: gives "scores", sqrt(sigmoid(class) sigmoid(alignment)), and "reg_logits"."""

    def __init__(self, channels: int, num_convs: int, num_classes: int, layers: Layers):
        self.body = Body(channels, num_convs, layers)
        self.se = Excitation(channels, layers)
        outputs = dataclasses.replace(layers, init_std=0.01)
        self.cls = outputs.linear(channels, num_classes, bias_init=RARE)
        self.reg = outputs.linear(channels, SIDES * BINS)
        self.align = Alignment(channels, layers)

    def __call__(self, x: Map, *, training: bool) -> dict[str, Map]:
        x = self.body(x, training=training)
        excited = self.se(x, training=training)
        logits = (self.cls(excited), self.align(x, training=training))
        classes, alignment = (jax.nn.sigmoid(x.astype(jnp.float32)) for x in logits)
        return {"scores": jnp.sqrt(classes * alignment + SCORE_EPSILON), "reg_logits": self.reg(excited)}


class LegacyHead(nnx.Module):
    """The legacy head: one 1 x 1 convolution gives "cls_logits" and "reg_logits"."""

    def __init__(self, channels: int, num_convs: int, num_classes: int, layers: Layers):
        self.num_classes = num_classes
        self.body = Body(channels, num_convs, layers)
        outputs = dataclasses.replace(layers, init_std=0.01)
        self.output = outputs.linear(channels, num_classes + SIDES * BINS, bias_init=RARE)

    def __call__(self, x: Map, *, training: bool) -> dict[str, Map]:
        logits = self.output(self.body(x, training=training))
        return {"cls_logits": logits[..., : self.num_classes], "reg_logits": logits[..., self.num_classes :]}


HEADS: dict[str, Callable[[int, int, int, Layers], nnx.Module]] = {"lc_pan": Head, "csp_pan": LegacyHead}
