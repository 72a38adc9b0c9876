"""PicoDet (Yu et al., 2021), an anchor-free detector, on the feature maps of a backbone with any kind of attention.

Castling-ViT's detectors are "on top of PicoDet", and their code is not published. In our reading, castling replaces the
attention in the backbone only, and neck and head are PicoDet's own. The neck "lc_pan" goes with the head of PicoDet's
second version, and "csp_pan" with the legacy head.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError, check_known
from castling_jax.models.backbone import Backbone, DenseConfig
from castling_jax.models.layers import Layers
from castling_jax.models.model import Model
from castling_jax.models.pan import NECKS, Pan
from castling_jax.models.picodet_heads import HEADS, HeadSizes
from castling_jax.models.pyramid import SimpleFeaturePyramid
from castling_jax.ops.points import STRIDES, decode_boxes, level_points
from castling_jax.sizes import ImageSize, image_shape

# Each side of an image is a multiple of SIDE and at least SMALLEST. 160 pixels give 3 x 3 points at stride 64. ATSS,
# which chooses the points that learn a box, needs nine points on every level.
SIDE, SMALLEST = 32, 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class PicoDetConfig(DenseConfig):
    """PicoDet's constructor arguments.

    The sides of the images are multiples of 32, and at least 160. Position embeddings and attention biases are made for
    `image_size`; the model also takes images of other sizes that meet the same condition.

    Attributes:
      neck: "lc_pan" or "csp_pan".
      neck_channels: channels of the neck, the head, and the pyramid that a backbone with one map needs.
      num_convs: number of depthwise-separable convolutions in each level's head.
    """

    num_classes: int = 80
    image_size: ImageSize = 416
    backbone: str = "levit_128s"
    neck: str = "lc_pan"
    neck_channels: int
    num_convs: int

    @property
    def backbone_image_size(self) -> ImageSize:
        # Checked before there is a backbone, whose own rule allows sizes that a detector does not take.
        check_image_size(image_shape(self.image_size))
        return self.image_size


class PicoDet(Model):
    """PicoDet on a backbone without a classifier; `apply` gives scores and boxes for all points, before suppression.

    The neck reads the backbone's maps at strides 8, 16 and 32, and LeViT's map at 64 too. A backbone with only one map
    (DeiT) gets ViTDet's simple feature pyramid, as wide as the neck, which makes three maps.

    Raises:
      InputError: the neck is unknown, or the backbone has neither these maps nor a single map whose stride is a power
        of two.
    """

    task: ClassVar[str] = "detection"
    strides: ClassVar[tuple[int, ...]] = STRIDES

    def __init__(self, config: PicoDetConfig, backbone: Backbone, layers: Layers):
        check_known("neck", config.neck, NECKS)
        self.in_chans = backbone.in_chans
        self.backbone = backbone
        strides, widths, channels = backbone.feature_strides, backbone.feature_channels, config.neck_channels
        places = [strides.index(stride) for stride in STRIDES if stride in strides]
        self.pyramid: SimpleFeaturePyramid | None = nnx.data(None)
        if len(strides) == 1 and isinstance(strides[0], int) and strides[0].bit_count() == 1:  # a power of two
            places = [0]
            scales = [strides[0] / stride for stride in STRIDES[:3]]
            self.pyramid = SimpleFeaturePyramid(widths[0], channels, scales, layers)
        elif not {*STRIDES[:3]} <= {*strides}:
            needed = "maps at strides of 8, 16 and 32 pixels, or one map at a power of two"
            raise InputError(f"a detector needs {needed}, not {config.backbone}'s {strides}.")
        self.places = tuple(places)  # which of the backbone's maps the neck reads
        inputs = [channels] * 3 if self.pyramid else [widths[place] for place in places]
        self.neck = Pan(inputs, channels, config.neck, layers)
        sizes = HeadSizes(channels, config.num_convs, config.num_classes)
        # Each level has a head with weights of its own, as in PicoDet, because the levels' maps differ.
        self.head = nnx.List(HEADS[config.neck](sizes, layers) for _ in STRIDES)

    def training_outputs(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """The outputs that a loss reads, in float32, and the backbone's mask densities.

        Points have the order of `level_points`: level by level, finest first, and row by row within a level.

        Returns:
          A pair (outputs, densities [layers]); outputs is a dict with

          "scores" [batch, points, classes]: probabilities.
          "boxes" [batch, points, 4]: x0, y0, x1, y1 in pixels of the images.
          "reg_logits" [batch, points, 32]: logits of the box bins, 8 for each side (left, top, right, bottom).
          "cls_logits" [batch, points, classes]: from the legacy head only; "scores" are their sigmoid.

        Raises:
          InputError: `check_image_size` or the backbone refuses the images.
        """
        height, width = images.shape[1:3]
        check_image_size((height, width))
        maps, densities = self.backbone.feature_maps(self._checked(images), mask_threshold=mask_threshold, key=key)
        maps = [maps[place] for place in self.places]
        if self.pyramid is not None:
            maps = self.pyramid(maps[0])
        return self._detect(maps, training=key is not None), densities

    def results(self, outputs: dict[str, Array]) -> dict[str, Array]:
        return {name: outputs[name] for name in ("scores", "boxes")}

    def _detect(self, maps: list[Array], *, training: bool) -> dict[str, Array]:
        """Computes neck, heads and boxes from the maps."""
        maps = self.neck(maps, training=training)
        with jax.named_scope("head"):
            levels = [head(x, training=training) for head, x in zip(self.head, maps, strict=True)]
        # float32 from here on, whatever the compute dtype: in bfloat16 a coordinate above 256 has steps of 2 pixels.
        outputs = {
            name: jnp.concatenate([_flat(level[name]) for level in levels], axis=1).astype(jnp.float32)
            for name in levels[0]
        }
        if "scores" not in outputs:
            outputs["scores"] = jax.nn.sigmoid(outputs["cls_logits"])
        # The finest map tells the image's size, because every side of an image is a multiple of its stride.
        rows, columns = maps[0].shape[1:3]
        points, strides, _ = level_points((STRIDES[0] * rows, STRIDES[0] * columns))
        return outputs | {"boxes": decode_boxes(outputs["reg_logits"], points, strides)}


def _flat(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch points channels"]:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height * width, channels)


def check_image_size(size: tuple[int, ...]) -> None:
    """Raises an InputError unless (height, width) in pixels is a size that a detector takes."""
    height, width = size
    if min(size) < SMALLEST or height % SIDE or width % SIDE:
        allowed = f"images whose sides are multiples of {SIDE} pixels and at least {SMALLEST}"
        raise InputError(f"a detector takes {allowed}, not {height} x {width}.")
