"""A semantic segmenter: a backbone's feature maps and SegFormer's all-MLP head (Xie et al., NeurIPS 2021).

Castling-ViT's segmenters are "on top of Mask2Former", and their code is not published. This one is simpler: every pixel
gets a class from an MLP over the maps. The backbone is castled, the head has no attention.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError
from castling_jax.models.backbone import Backbone, DenseConfig
from castling_jax.models.batch_norm import LinearNorm
from castling_jax.models.layers import Layers, interpolate
from castling_jax.models.model import Model
from castling_jax.models.pyramid import SimpleFeaturePyramid
from castling_jax.sizes import ImageSize, image_shape

STRIDES = (4, 8, 16, 32)  # of the pyramid on a plain transformer's map, in pixels
SIDE = 32  # the sides of the images that the backbone sees are multiples of it: every backbone takes such images

Map = Float[Array, "batch height width channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig(DenseConfig):
    """The segmenter's constructor arguments.

    Images may have any size. Position embeddings and attention biases are made for `image_size`, with its sides rounded
    up to multiples of 32.

    Attributes:
      head_channels: channels of the head, and of the pyramid that a backbone with one map needs.
    """

    num_classes: int = 150
    image_size: ImageSize = 512
    backbone: str = "deit_tiny"
    head_channels: int = 256

    @property
    def backbone_image_size(self) -> ImageSize:
        height, width = map(_rounded_up, image_shape(self.image_size))
        return height if height == width else (height, width)


class MlpHead(nnx.Module):
    """SegFormer's head: a dense layer on each map, all of them at the finest map's size, and two layers on top.

    There is no dropout, which SegFormer has before the classifier.

    Args:
      widths: channels of each map, finest first.
      channels: channels of the head.
      num_classes: number of classes.
      layers: makes the layers.
    """

    def __init__(self, widths: Sequence[int], channels: int, num_classes: int, layers: Layers):
        self.projections = nnx.List(layers.linear(width, channels) for width in widths)
        self.fuse = LinearNorm(len(widths) * channels, channels, layers)
        self.classifier = layers.linear(channels, num_classes)

    @jax.named_scope("head")
    def __call__(self, maps: Sequence[Map], *, training: bool) -> Map:
        """Each position's logits, on the finest map's grid."""
        fuse = self.fuse.linear
        dtype = fuse.dtype or maps[0].dtype
        # SegFormer resizes the maps, concatenates them and multiplies by one kernel. Each map's part of the kernel may
        # be applied before the resize, as both are linear: the coarse maps then cost a fraction of the finest one.
        kernels = jnp.split(fuse.kernel[...].astype(dtype), len(maps))
        parts = [
            resize(projection(x) @ kernel, maps[0].shape[1:3])
            for projection, kernel, x in zip(self.projections, kernels, maps, strict=True)
        ]
        x = sum(parts[1:], start=parts[0])
        if fuse.bias is not None:
            x = x + fuse.bias[...].astype(dtype)
        if self.fuse.bn is not None:
            x = self.fuse.bn.normalize(x, training)
        return self.classifier(jax.nn.relu(x))


class PyramidSegmenter(Model):
    """A segmenter on a backbone without a classifier; `apply` gives {"logits": [batch, height, width, classes]}.

    The head reads all of the backbone's maps: LeViT's at strides of 8, 16, 32 and 64 pixels, MViTv2's at 4 to 32. A
    backbone with one map (DeiT) gets ViTDet's simple feature pyramid, which makes maps at 4, 8, 16 and 32.

    Raises:
      InputError: the backbone has a single map, whose stride is not a power of two up to 32.
    """

    task: ClassVar[str] = "segmentation"

    def __init__(self, config: SegmenterConfig, backbone: Backbone, layers: Layers):
        self.in_chans = backbone.in_chans
        self.backbone = backbone
        strides, widths, channels = backbone.feature_strides, backbone.feature_channels, config.head_channels
        self.pyramid: SimpleFeaturePyramid | None = nnx.data(None)
        if len(strides) == 1:
            (stride,) = strides
            if not isinstance(stride, int) or stride.bit_count() != 1 or stride > SIDE:
                raise InputError(
                    f"a segmenter needs patches of a power of two up to {SIDE} pixels, not {config.backbone}'s of "
                    f"{stride}."
                )
            self.pyramid = SimpleFeaturePyramid(widths[0], channels, [stride / fine for fine in STRIDES], layers)
            widths = (channels,) * len(STRIDES)
        self.head = MlpHead(widths, channels, config.num_classes, layers)

    def training_outputs(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """({"logits": [batch, height, width, classes] in float32}, the backbone's mask densities).

        Inside, the images are padded with zeros on the right and at the bottom to multiples of 32 pixels.

        Raises:
          InputError: the backbone refuses the images.
        """
        height, width = images.shape[1:3]
        padded = self._padded(images)
        maps, densities = self.backbone.feature_maps(padded, mask_threshold=mask_threshold, key=key)
        if self.pyramid is not None:
            maps = self.pyramid(maps[0])
        logits = self.head(maps, training=key is not None).astype(jnp.float32)
        with jax.named_scope("head"):
            logits = resize(logits, padded.shape[1:3])[:, :height, :width]
        return {"logits": logits}, densities

    def features(
        self, images: Float[Array, "batch height width channels"], *, mask_threshold: ArrayLike | None = None
    ) -> list[Map]:
        return super().features(self._padded(images), mask_threshold=mask_threshold)

    def _padded(self, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        padding = [(0, 0), (0, _rounded_up(height) - height), (0, _rounded_up(width) - width), (0, 0)]
        return jnp.pad(self._checked(images), padding)

    def results(self, outputs: dict[str, Array]) -> dict[str, Array]:
        return outputs


def resize(x: Map, size: tuple[int, ...]) -> Map:
    """Resizes maps bilinearly to (height, width), as PyTorch does with `align_corners=False`."""
    batch, *_, channels = x.shape
    return interpolate(x, (batch, *size, channels), "linear", antialias=False)


def _rounded_up(side: int) -> int:
    return -(-side // SIDE) * SIDE
