"""What every backbone is to the rest of the package."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key


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
    """A classifier of images of `in_chans` channels; `spec` is set by `create_model`."""

    spec: ModelSpec
    in_chans: int

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "layers"]]:
        """Logits in float32, the mean of the heads', and the mask density of each layer.

        The arguments are as in `head_logits`, and so is what is raised.
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
        """Each classifier's logits in float32, the one for distillation last, and the mask density of each layer.

        With a key in training mode: drop-path is on, and batch norm goes by the batch's statistics and updates its own.

        Raises:
          InputError: images that do not fit the model, or a castling model in training form without a threshold.
        """
        raise NotImplementedError

    def features(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "batch height width channels"]]:
        """What a detector or segmenter takes: the tokens on their grid, [batch, height, width, channels], one a stage.

        The arguments are as in `__call__`.
        """
        raise NotImplementedError
