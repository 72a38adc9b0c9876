"""PicoDet (Yu et al., 2021), an anchor-free detector, on the maps of a backbone with any kind of attention.

Castling-ViT's detectors are "on top of PicoDet", and their code is not published. In our reading the backbone is
castled, and neck and head are PicoDet's. The neck "lc_pan" comes with the head of PicoDet's second version, and
"csp_pan" with the legacy head.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError, check_known
from castling_jax.models.backbone import Backbone
from castling_jax.models.layers import Layers
from castling_jax.models.model import Model
from castling_jax.models.pan import NECKS, Pan
from castling_jax.models.picodet_heads import HEADS, HeadSizes
from castling_jax.models.pyramid import SimpleFeaturePyramid
from castling_jax.ops.points import STRIDES, decode_boxes, level_points
from castling_jax.sizes import ImageSize, image_shape

SIDE, SMALLEST = 32, 160  # in 160 pixels, stride 64 has 3 x 3 points, and ATSS needs nine on every level


@dataclasses.dataclass(frozen=True, kw_only=True)
class PicoDetConfig:
    """PicoDet's constructor words.

    Attributes:
      num_classes: classes of objects.
      image_size: pixels a side, or (height, width): multiples of 32 from 160 on. Position embeddings and attention
        biases are made for it; images of other such sizes are taken too.
      backbone: a classifier's name.
      backbone_arguments: its constructor words, as pairs of a word and a value.
      neck: "lc_pan" or "csp_pan".
      neck_channels: of neck and head, and of the pyramid below a backbone that has one map.
      num_convs: depthwise-separable convolutions of each level's head.
    """

    num_classes: int = 80
    image_size: ImageSize = 416
    backbone: str = "levit_128s"
    backbone_arguments: tuple[tuple[str, Any], ...] = ()
    neck: str = "lc_pan"
    neck_channels: int
    num_convs: int


class PicoDet(Model):
    """PicoDet on a backbone without a classifier; `apply` gives scores and boxes of all points, before suppression.

    A backbone with maps at strides 8, 16 and 32 (LeViT, MViTv2) gives them to the neck, and that at 64 where it has
    one. A backbone with one map (DeiT) gives it to ViTDet's simple feature pyramid first, as wide as the neck.

    Raises:
      InputError: the neck is unknown, the image's size is no multiple of 32 from 160 on, or the backbone has neither
        the maps nor one at a stride that is a power of two.
    """

    task: ClassVar[str] = "detection"
    strides: ClassVar[tuple[int, ...]] = STRIDES

    def __init__(self, config: PicoDetConfig, backbone: Backbone, layers: Layers):
        check_known("neck", config.neck, NECKS)
        check_image_size(image_shape(config.image_size))
        self.in_chans = backbone.in_chans
        self.backbone = backbone
        strides, widths, channels = backbone.feature_strides, backbone.feature_channels, config.neck_channels
        places = [strides.index(stride) for stride in STRIDES if stride in strides]
        self.pyramid: SimpleFeaturePyramid | None = nnx.data(None)
        if len(strides) == 1 and isinstance(strides[0], int) and strides[0].bit_count() == 1:
            places = [0]
            scales = [strides[0] / stride for stride in STRIDES[:3]]
            self.pyramid = SimpleFeaturePyramid(widths[0], channels, scales, layers)
        elif not {*STRIDES[:3]} <= {*strides}:
            raise InputError(
                f"{config.backbone} has maps at strides of {strides} pixels: a detector needs 8, 16 and 32 among them, "
                "or one at a power of two."
            )
        self.places = tuple(places)  # of the maps that are read
        inputs = [channels] * 3 if self.pyramid else [widths[place] for place in places]
        self.neck = Pan(inputs, channels, config.neck, layers)
        sizes = HeadSizes(channels, config.num_convs, config.num_classes)
        self.head = nnx.List(HEADS[config.neck](sizes, layers) for _ in STRIDES)

    def training_outputs(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """All that a loss reads, in float32, and the backbone's mask densities.

        Points run level by level, at STRIDES, each level row by row, as `level_points` lists them.

        Returns:
          A pair of the densities [layers], last, and a dict with

          "scores" [batch, points, classes]: probabilities.
          "boxes" [batch, points, 4]: x0, y0, x1, y1 in pixels of the images.
          "reg_logits" [batch, points, 32]: of the box bins, side by side (left, top, right, bottom), 8 bins each.
          "cls_logits" [batch, points, classes]: with the legacy head alone; "scores" are their sigmoid.

        Raises:
          InputError: the images' sides are no multiples of 32 from 160 on; and what a backbone raises.
        """
        height, width = images.shape[1:3]
        check_image_size((height, width))
        maps, densities = self.backbone.feature_maps(self._checked(images), mask_threshold=mask_threshold, key=key)
        maps = [maps[place] for place in self.places]
        if self.pyramid is not None:
            maps = self.pyramid(maps[0])
        return self._detect(maps, (height, width), training=key is not None), densities

    def results(self, outputs: dict[str, Array]) -> dict[str, Array]:
        return {name: outputs[name] for name in ("scores", "boxes")}

    def _detect(self, maps: list[Array], image_size: tuple[int, int], *, training: bool) -> dict[str, Array]:
        """Neck, head and boxes."""
        maps = self.neck(maps, training=training)
        with jax.named_scope("head"):
            levels = [head(x, training=training) for head, x in zip(self.head, maps, strict=True)]
        outputs = {
            name: jnp.concatenate([_flat(level[name]) for level in levels], axis=1).astype(jnp.float32)
            for name in levels[0]
        }
        if "scores" not in outputs:
            outputs["scores"] = jax.nn.sigmoid(outputs["cls_logits"])
        points, strides, _ = level_points(image_size)
        return outputs | {"boxes": decode_boxes(outputs["reg_logits"], points, strides)}


def _flat(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch points channels"]:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height * width, channels)


def check_image_size(size: tuple[int, ...]) -> None:
    """Raises an InputError unless (height, width) in pixels is a size that a detector takes."""
    height, width = size
    if min(size) < SMALLEST or height % SIDE or width % SIDE:
        raise InputError(
            f"a detector takes images whose sides are multiples of {SIDE} from {SMALLEST} pixels on, "
            f"not {height} x {width}."
        )
