"""What every backbone is to the rest of the package."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError
from castling_jax.models.attention.core import Core
from castling_jax.models.layers import Layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The constructor words of every backbone; each family adds its own. They are timm's where timm has them.

    Attributes:
      num_classes: size of the classifier's output.
      image_size: pixels a side.
      in_chans: channels of an image.
      mlp_ratio: width of an MLP's hidden layer, as a multiple of its input's width.
      drop_path_rate: probability that a sample skips a residual branch in training.
      remat: whether the backward pass computes the inner values of a block again, to save memory.
      token_conv: the convolution of the values: "1d" over tokens, "2d" over the grid, or None.
      token_kernel_size: taps, or rows and columns, of that convolution; None is 9 for "1d" and 3 for "2d".
      implementation: "auto", "xla" or "pallas", as in `ops`.
      mask_kind: how the mask's threshold empties castling's softmax branch: "threshold" or "fade", as in `ops`.
    """

    num_classes: int = 1000
    image_size: int = 224
    in_chans: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    remat: bool = False
    token_conv: str | None = "2d"
    token_kernel_size: int | None = None
    implementation: str = "auto"
    mask_kind: str = "threshold"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model was made from: enough to make it again, in either form."""

    name: str
    attention: str
    form: str
    num_classes: int
    image_size: int
    dtype: str
    param_dtype: str
    overrides: tuple[tuple[str, Any], ...]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `create_model`, plain enough for JSON, with `changes` among them."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return arguments | dict(arguments.pop("overrides")) | changes


class Backbone(nnx.Module):
    """A classifier of images of `in_chans` channels; `create_model` sets `spec`.

    Args:
      config: the sizes.
      core: the attention.
      layers: makes the layers.

    Attributes:
      task: the task that the model is for, by its name in tasks/registry.py.
      takes_modules: whether an attention kind may bring a module of its own in the place of multi-head attention.
    """

    task: ClassVar[str] = "classification"
    takes_modules: ClassVar[bool] = False
    spec: ModelSpec
    in_chans: int

    def __init__(self, config: Any, core: Core, layers: Layers):
        raise NotImplementedError

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "layers"]]:
        """Logits in float32, the mean of the heads', and the mask density of each layer.

        Arguments and errors are those of `head_logits`.
        """
        logits, densities = self.head_logits(images, mask_threshold=mask_threshold, key=key)
        return logits.mean(axis=0), densities

    def head_logits(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "heads batch classes"], Float[Array, "layers"]]:
        """Each head's logits in float32, the distillation head last, and the mask density of each layer.

        A key turns training mode on: drop-path drops branches, and batch norm normalises by the batch's statistics and
        updates its running ones.

        Raises:
          InputError: images that do not fit the model, or a castling model in training form without a threshold.
        """
        encoded, densities = self._encode(self._checked(images), mask_threshold, key)
        return self._classify(encoded, densities, training=key is not None)

    def features(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "batch height width channels"]]:
        """What a detector or segmenter takes: one array [batch, height, width, channels] for each stage.

        DeiT has one entry, the patches' tokens after the last norm. LeViT has the tokens after each stage, at strides
        of 16, 32 and 64 pixels. MViTv2 has them too, at strides of 4, 8, 16 and 32; the last are not yet normed.
        Arguments and errors are those of `head_logits`.
        """
        encoded, _ = self._encode(self._checked(images), mask_threshold, key)
        return self._maps(encoded)

    def __repr__(self) -> str:
        spec = getattr(self, "spec", None)
        if spec is None:
            return type(self).__name__
        words = [f"{word}={value!r}" for word, value in spec.arguments().items() if word != "name"]
        return f"{type(self).__name__}({spec.name!r}, {', '.join(words)})"

    def _checked(self, images: jax.Array) -> jax.Array:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images must be floating-point numbers that were normalised, not {images.dtype}: "
                "castling_jax.preprocess makes them of files and of pixels."
            )
        if isinstance(jax.tree.leaves(nnx.state(self, nnx.Param))[0], jax.ShapeDtypeStruct):
            raise InputError("this model holds shapes alone: castling_jax.apply(model, variables, images) computes.")
        if images.shape[3] != self.in_chans:
            raise InputError(f"images must have {self.in_chans} channels, not {images.shape[3]}.")
        return images

    def _encode(self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None) -> tuple[Any, Any]:
        """All but the heads: what `_classify` and `_maps` take, and the mask densities."""
        raise NotImplementedError

    def _classify(self, encoded: Any, densities: Any, *, training: bool) -> tuple[jax.Array, jax.Array]:
        """The heads: what `head_logits` returns."""
        raise NotImplementedError

    def _maps(self, encoded: Any) -> list[jax.Array]:
        """What `features` returns."""
        raise NotImplementedError
