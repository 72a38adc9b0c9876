"""ViTDet's simple feature pyramid (Li et al., ECCV 2022): maps at several strides from a plain transformer's map."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax.models.layers import TORCH_INIT, Layers, torch_bias_init
from castling_jax.ops.gelu import gelu

SCALES = (4.0, 2.0, 1.0, 0.5)  # strides of 4, 8, 16 and 32 pixels from patches of 16 pixels
Map = Float[Array, "batch height width channels"]


class Double(nnx.Module):
    """A transposed 2 x 2 convolution of stride 2: each position becomes 2 x 2, by four matrices."""

    def __init__(self, features_in: int, features_out: int, layers: Layers):
        # PyTorch takes fan_in from a kernel's second axis, which in a transposed convolution is the outputs' axis.
        init = torch_bias_init(4 * features_out)
        shape = (2, 2, features_in, features_out)
        self.dtype = layers.dtype
        self.kernel = nnx.Param(init(layers.rngs.params(), shape, layers.param_dtype))
        self.bias = nnx.Param(init(layers.rngs.params(), (features_out,), layers.param_dtype))

    def __call__(self, x: Map) -> Map:
        kernel, bias = (parameter[...].astype(self.dtype) for parameter in (self.kernel, self.bias))
        batch, height, width, _ = x.shape
        # The stride is the kernel's size, so windows do not overlap, and a matrix product computes the convolution.
        doubled = jnp.einsum("byxc,ijcd->byixjd", x.astype(self.dtype), kernel) + bias
        return doubled.reshape(batch, 2 * height, 2 * width, -1)


class Level(nnx.Module):
    """One map of the pyramid: the input resized by `scale`, then 1 x 1 and 3 x 3 convolutions, each with layer norm."""

    def __init__(self, channels: int, out_channels: int, scale: float, layers: Layers):
        self.shrink = round(max(1 / scale, 1))
        # The channels before and after each doubling: scale 4 takes two, from c over c / 2 to c / 4.
        widths = [channels // 2**i for i in range(round(math.log2(max(scale, 1))) + 1)]
        pairs = list(itertools.pairwise(widths))
        self.doubles = nnx.List(Double(before, after, layers) for before, after in pairs)
        # Norm and GELU stand only between two doublings, as in ViTDet: `lateral` reads the last doubling's raw result.
        self.norms = nnx.List(layers.layer_norm(after) for _, after in pairs[:-1])
        options = {"use_bias": False, "kernel_init": TORCH_INIT, **layers.flax}
        self.lateral = nnx.Conv(widths[-1], out_channels, (1, 1), **options)
        self.lateral_norm = layers.layer_norm(out_channels)
        self.output = nnx.Conv(out_channels, out_channels, (3, 3), padding=1, **options)
        self.output_norm = layers.layer_norm(out_channels)

    def __call__(self, x: Map) -> Map:
        for i, double in enumerate(self.doubles):
            x = double(x)
            if i < len(self.norms):
                x = gelu(self.norms[i](x))
        if self.shrink > 1:
            x = nnx.max_pool(x, (self.shrink, self.shrink), (self.shrink, self.shrink))
        return self.output_norm(self.output(self.lateral_norm(self.lateral(x))))


class SimpleFeaturePyramid(nnx.Module):
    """Turns one map into a map for each of `scales`, in their order.

    Args:
      channels: channels of the input map.
      out_channels: channels of each output map.
      scales: sides of the output maps, as multiples of the input's sides; powers of two. Transposed convolutions, each
        of which halves the channels, enlarge the map; max pooling, which rounds sides down, shrinks it.
      layers: makes the layers.
    """

    def __init__(self, channels: int, out_channels: int, scales: Sequence[float], layers: Layers):
        self.levels = nnx.List(Level(channels, out_channels, scale, layers) for scale in scales)

    @jax.named_scope("pyramid")
    def __call__(self, x: Map) -> list[Map]:
        return [level(x) for level in self.levels]


def simple_feature_pyramid(params: dict[str, Any], x: Map, scales: Sequence[float] = SCALES) -> list[Map]:
    """`SimpleFeaturePyramid` as a pure function of its parameters.

    Args:
      params: {"levels": {"0": {"doubles": {"0": {"kernel" [2, 2, in, out], "bias"}, ...}, "norms", "lateral",
        "lateral_norm", "output", "output_norm"}, ...}}: the names of `nnx.state`, with string keys.
      x: the input map.
      scales: the scale of each level.
    """
    out_channels = params["levels"]["0"]["lateral"]["kernel"].shape[-1]

    def shapes() -> SimpleFeaturePyramid:
        layers = Layers(dtype=x.dtype, param_dtype=x.dtype, rngs=nnx.Rngs(0))
        return SimpleFeaturePyramid(x.shape[-1], out_channels, scales, layers)

    module = nnx.eval_shape(shapes)
    graphdef, state = nnx.split(module)
    bound = {path: variable.replace(_at(params, path)) for path, variable in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(bound))(x)


def _at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[str(key)]
    return tree
