"""PicoDet's heads, one for each level: the second version's head, and the legacy head (Yu et al., 2021).

A head turns a map into class scores and box bins. Box bins are the logits of four distributions over distances: to the
left, the top, the right and the bottom of a box.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.batch_norm import ConvNorm, LinearNorm
from castling_jax.models.depthwise_separable import KERNEL_SIZE, separable
from castling_jax.models.initializers import normal
from castling_jax.models.layers import Layers
from castling_jax.models.pan import KAIMING_UNIFORM
from castling_jax.ops.points import BINS, SIDES

HEAD_STD, EXCITATION_STD = 0.01, 0.001  # standard deviations of the normals that kernels start from
# Class probabilities start at 0.01, because most points see no object: from 0.5 on their loss would drown the others'.
RARE = jax.nn.initializers.constant(-math.log(99))
SCORE_EPSILON = 1e-9  # added under the square root, whose gradient at zero is infinite
Map = Float[Array, "batch height width channels"]


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """The sizes of a head.

    Attributes:
      channels: channels of the map that the head reads.
      num_convs: number of depthwise-separable convolutions before the outputs.
      num_classes: number of object classes.
    """

    channels: int
    num_convs: int
    num_classes: int

    def body(self, layers: Layers) -> nnx.List:
        """The convolutions before the outputs."""
        return nnx.List(separable(self.channels, self.channels, layers) for _ in range(self.num_convs))


class LegacyHead(nnx.Module):
    """The legacy head: one 1 x 1 convolution gives "cls_logits" and "reg_logits"."""

    def __init__(self, sizes: HeadSizes, layers: Layers):
        layers = head_layers(layers)
        self.num_classes = sizes.num_classes
        self.body = sizes.body(layers)
        self.output = layers.linear(sizes.channels, sizes.num_classes + SIDES * BINS, bias_init=RARE)

    def __call__(self, x: Map, *, training: bool) -> dict[str, Map]:
        for conv in self.body:
            x = conv(x, training=training)
        logits = self.output(x)
        return {"cls_logits": logits[..., : self.num_classes], "reg_logits": logits[..., self.num_classes :]}


class Head(nnx.Module):
    """The second version's head: "scores", which are sqrt(sigmoid(class) sigmoid(alignment)), and "reg_logits".

    The alignment tells how well class and box agree. It comes from a dense 5 x 5 convolution to one channel and a 1 x 1
    convolution, each with batch norm. Class and box bins come from the excited map: a gate, computed from the channels'
    means, scales the channels, and a 1 x 1 convolution mixes them.
    """

    def __init__(self, sizes: HeadSizes, layers: Layers):
        layers = head_layers(layers)
        channels = sizes.channels
        self.body = sizes.body(layers)
        self.se = nnx.Dict(
            fc=dataclasses.replace(layers, init_std=EXCITATION_STD).linear(channels, channels),
            conv=LinearNorm(channels, channels, layers),
        )
        self.cls = layers.linear(channels, sizes.num_classes, bias_init=RARE)
        self.reg = layers.linear(channels, SIDES * BINS)
        layers = dataclasses.replace(layers, kernel_init=KAIMING_UNIFORM)
        self.align = nnx.Dict(
            dense=ConvNorm(channels, 1, layers, kernel_size=KERNEL_SIZE, stride=1),
            pointwise=LinearNorm(1, 1, layers),
        )

    def __call__(self, x: Map, *, training: bool) -> dict[str, Map]:
        for conv in self.body:
            x = conv(x, training=training)
        gate = jax.nn.sigmoid(self.se.fc(jnp.mean(x, axis=(1, 2), keepdims=True)))
        excited = jax.nn.hard_swish(self.se.conv(x * gate, training=training))
        alignment = jax.nn.hard_swish(self.align.dense(x, training=training))
        logits = (self.cls(excited), self.align.pointwise(alignment, training=training))
        # The loss reads the scores, not logits, so the sigmoids must not round to 0 or 1 in bfloat16.
        classes, agreement = (jax.nn.sigmoid(logit.astype(jnp.float32)) for logit in logits)
        return {"scores": jnp.sqrt(classes * agreement + SCORE_EPSILON), "reg_logits": self.reg(excited)}


def head_layers(layers: Layers) -> Layers:
    """Layers with the initial values of a head's layers."""
    return dataclasses.replace(layers, init_std=HEAD_STD, kernel_init=normal(HEAD_STD))


HEADS = {"lc_pan": Head, "csp_pan": LegacyHead}
