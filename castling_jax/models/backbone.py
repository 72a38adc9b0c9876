"""The interface of every backbone."""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.models.attention.core import Core
from castling_jax.models.layers import Layers
from castling_jax.models.model import Model
from castling_jax.sizes import ImageSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The constructor arguments that all backbones share; each family adds its own. timm's arguments keep their names.

    Attributes:
      num_classes: size of the classifier's output, at least 1. A detector, segmenter or masked autoencoder sets 0 for
        its backbone, which then has no classifier.
      image_size: pixels a side, or (height, width).
      in_chans: channels of an image.
      mlp_ratio: width of an MLP's hidden layer, as a multiple of its input's width.
      drop_path_rate: probability that a sample skips a residual branch in training. LeViT has it in every block; DeiT
        and MViTv2 have it in the last block, and rise to it linearly from 0 in the first.
      remat: whether the backward pass recomputes a block's inner values, to save memory.
      token_conv: the convolution of the values: "1d" over tokens, "2d" over the grid, or None.
      token_kernel_size: the convolution's taps along each axis, an odd number; None is 9 for "1d" and 3 for "2d".
      implementation: "auto", "xla" or "pallas", as in `ops`.
      mask_kind: how the mask's threshold empties castling's softmax branch: "threshold" or "fade", as in `ops`.
    """

    num_classes: int = 1000
    image_size: ImageSize = 224
    in_chans: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    remat: bool = False
    token_conv: str | None = "2d"
    token_kernel_size: int | None = None
    implementation: str = "auto"
    mask_kind: str = "threshold"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """The constructor arguments that all models on a backbone without a classifier share.

    Attributes:
      num_classes: number of classes.
      image_size: pixels a side, or (height, width).
      backbone: name of the classifier whose feature maps the model reads.
      backbone_arguments: the backbone's constructor arguments, as pairs (name, value).
    """

    num_classes: int
    image_size: ImageSize
    backbone: str
    backbone_arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def backbone_image_size(self) -> ImageSize:
        """Size of the images that the backbone sees."""
        return self.image_size


class Backbone(Model):
    """A classifier; or, with 0 classes, the feature maps that a detector's or a segmenter's head reads.

    Args:
      config: the family's configuration.
      core: the attention.
      layers: makes the layers.

    Attributes:
      takes_modules: whether an attention kind may replace multi-head attention with a module of its own.
      stem_maps: number of feature maps before the first stage.
      feature_strides: stride of each feature map in pixels, finest first; a pair (height, width) where the two differ.
      feature_channels: channels of each feature map.
    """

    task: ClassVar[str] = "classification"
    takes_modules: ClassVar[bool] = False
    batch_axis: ClassVar[int] = 1
    stem_maps: ClassVar[int] = 0
    feature_strides: tuple[int | tuple[int, int], ...]
    feature_channels: tuple[int, ...]

    def __init__(self, config: Any, core: Core, layers: Layers):
        raise NotImplementedError

    def head_logits(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "heads batch classes"], Float[Array, "layers"]]:
        """Each head's logits in float32, the distillation head last, and the mask density of each layer.

        A key turns training mode on: drop-path drops branches, and batch norm normalises by the batch's statistics and
        updates its running statistics.

        Raises:
          InputError: the images do not fit the model, or a castling model in training form has no threshold.
        """
        encoded, densities = self._encode(self._checked(images), mask_threshold, key, for_maps=False)
        return self._classify(encoded, densities, training=key is not None)

    training_outputs = head_logits

    def results(self, outputs: Float[Array, "heads batch classes"]) -> Float[Array, "batch classes"]:
        """The mean of the heads' logits."""
        return outputs.mean(axis=0)

    def feature_maps(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[list[Float[Array, "batch height width channels"]], Float[Array, "layers"]]:
        """The maps that a detector or a segmenter reads, one for each of `feature_strides`, and the mask densities.

        DeiT has one map: the patches' tokens after the last norm, which global_pool="avg" leaves out. LeViT has the
        output of the stem's third convolution, at a stride of 8 pixels, and the tokens after each stage, at 16, 32 and
        64. MViTv2 has the tokens after each stage, at 4, 8, 16 and 32, before any norm. Arguments and errors are those
        of `head_logits`.
        """
        return self._maps(*self._encode(self._checked(images), mask_threshold, key, for_maps=True))

    def features(
        self, images: Float[Array, "batch height width channels"], *, mask_threshold: ArrayLike | None = None
    ) -> list[Float[Array, "batch height width channels"]]:
        # Without the stem's map, which only detectors read: callers get one map for each stage.
        maps, _ = self.feature_maps(images, mask_threshold=mask_threshold)
        return maps[self.stem_maps :]

    def _encode(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None, *, for_maps: bool
    ) -> tuple[Any, Any]:
        """Everything before the heads. Returns the arguments `encoded` and `densities` of `_maps` or `_classify`."""
        raise NotImplementedError

    def _classify(self, encoded: Any, densities: Any, *, training: bool) -> tuple[jax.Array, jax.Array]:
        """The heads. Returns the result of `head_logits`."""
        raise NotImplementedError

    def _maps(self, encoded: Any, densities: Any) -> tuple[list[jax.Array], jax.Array]:
        """Returns the result of `feature_maps`."""
        raise NotImplementedError
