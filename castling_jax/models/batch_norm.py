"""Batch norm, and the layers that have it before or after them. In inference form it is folded into them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.layers import Layers, split_kernel, split_linear
from castling_jax.ops.around import normalize_channels
from castling_jax.ops.dense import dense
from castling_jax.ops.statistics import Statistics, channel_statistics, dense_with_statistics

BATCH_NORM_EPSILON = 1e-5


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, with PyTorch's constants; statistics are float32 in any dtype.

    PyTorch's momentum of 0.1 is 0.9 in Flax's convention. PyTorch updates the running variance with the unbiased
    variance. Here the update is the batch's variance, which is smaller by the factor 1 - 1 / (number of values).
    """

    def __init__(self, features: int, layers: Layers, *, scale: float = 1.0):
        super().__init__(
            features,
            momentum=0.9,
            epsilon=BATCH_NORM_EPSILON,
            scale_init=jax.nn.initializers.constant(scale),
            # In bfloat16 Flax would round the running statistics before it uses them.
            **layers.flax | {"dtype": jnp.float32},
        )

    def normalize(self, x: Float[Array, "*batch channels"], training: bool) -> Float[Array, "*batch channels"]:
        """Normalises by the batch's statistics in training, and updates the running ones; else by the running ones."""
        return normalize_channels(x, self.norm(channel_statistics([x]) if training else None))

    def norm(self, statistics: Statistics | None) -> Float[Array, "3 channels"]:
        """What `normalize_channels` takes. A batch's statistics update the running ones; None takes the running."""
        mean, variance = self.mean[...], self.var[...]
        if statistics is not None:
            mean = statistics.mean
            # One pass over the data, as in Flax; rounding may make a tiny variance negative.
            variance = jnp.maximum(statistics.mean_square - jnp.square(mean), 0)
            for running, batch in ((self.mean, mean), (self.var, variance)):
                # An assignment to `running[...]` asks a tracer for its sharding, and JAX searches the program for the
                # text of its refusal: a third of the time in which a detector's step is traced.
                running.set_value(jax.lax.stop_gradient(self.momentum * running[...] + (1 - self.momentum) * batch))
        assert self.scale is not None and self.bias is not None  # the constructor makes both
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return jnp.stack([mean, factor, self.bias[...]])


class ConvNorm(nnx.Module):
    """A convolution with a square kernel, then batch norm; with folded layers one convolution with a bias."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        layers: Layers,
        *,
        kernel_size: int = 3,
        stride: int = 2,
    ):
        self.linear = nnx.Conv(
            features_in,
            features_out,
            (kernel_size, kernel_size),
            strides=(stride, stride),
            padding=((kernel_size // 2, kernel_size // 2),) * 2,
            use_bias=layers.folded,
            kernel_init=layers.kernel_init,
            **layers.flax,
        )
        self.bn = None if layers.folded else BatchNorm(features_out, layers)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, training: bool
    ) -> Float[Array, "batch strided_height strided_width features"]:
        x = self.linear(x)
        return x if self.bn is None else self.bn.normalize(x, training)


class LinearNorm(nnx.Module):
    """A dense layer, then batch norm over all tokens; with folded layers one dense layer with a bias.

    `bn_scale` is the norm's initial scale: 0 if a residual branch has to start at zero.
    """

    def __init__(self, features_in: int, features_out: int, layers: Layers, *, bn_scale: float = 1.0):
        folded, init = layers.folded, layers.kernel_init
        self.linear = nnx.Linear(
            features_in, features_out, use_bias=folded, kernel_init=init, dot_general=dense, **layers.flax
        )
        self.bn = None if folded else BatchNorm(features_out, layers, scale=bn_scale)

    def __call__(self, x: Float[Array, "*batch channels"], *, training: bool) -> Float[Array, "*batch _"]:
        x = self.linear(x)
        return x if self.bn is None else self.bn.normalize(x, training)

    def split(
        self, x: Float[Array, "batch tokens channels"], edges: Sequence[int], *, training: bool
    ) -> tuple[list[Array], list[Array]]:
        """The dense layer's result cut at these channels, as `split_linear` cuts it, and the parts' norms, if any."""
        if self.bn is None:
            return split_linear(self.linear, x, edges), []
        statistics = None
        if training:
            dtype = self.linear.dtype
            parts, statistics = dense_with_statistics(x.astype(dtype), split_kernel(self.linear, dtype, edges))
        else:
            parts = split_linear(self.linear, x, edges)
        return parts, jnp.split(self.bn.norm(statistics), edges, axis=1)


class NormLinear(nnx.Module):
    """Batch norm, then a dense layer: a classifier head; with folded layers the dense layer alone."""

    def __init__(self, features: int, num_classes: int, layers: Layers):
        self.bn = None if layers.folded else BatchNorm(features, layers)
        self.linear = layers.linear(features, num_classes)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "batch channels"], *, training: bool) -> Float[Array, "batch classes"]:
        return self.linear(x if self.bn is None else self.bn.normalize(x, training))
