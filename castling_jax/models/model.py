"""The interface of every model, a classifier or a detector."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError, check
from castling_jax.sizes import ImageSize


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The arguments that a model was made from: enough to make the model again, in either form."""

    name: str
    attention: str
    form: str
    num_classes: int
    image_size: ImageSize
    dtype: str
    param_dtype: str
    overrides: tuple[tuple[str, Any], ...]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `create_model`, in types that JSON has, updated with `changes`."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arguments |= dict(arguments.pop("overrides"))
        if "backbone_arguments" in arguments:
            arguments["backbone_arguments"] = dict(arguments["backbone_arguments"])
        return arguments | changes

    def with_backbone(self, **changes: Any) -> dict[str, Any]:
        """`arguments` with `changes` to the backbone's constructor arguments; a classifier is its own backbone."""
        arguments = self.arguments()
        if "backbone" not in arguments:
            return arguments | changes
        return arguments | {"backbone_arguments": arguments.get("backbone_arguments", {}) | changes}


class Model(nnx.Module):
    """A network whose input is images with `in_chans` channels; `create_model` sets `spec`.

    Attributes:
      task: the task that the model is for, by its name in tasks/registry.py.
      backbone_defaults: constructor arguments that its backbone has unless the user gives others.
      batch_axis: the axis of `training_outputs` that runs over the images.
      draws: whether the model draws something in evaluation too, and takes a key there.
      backbone: the classifier without its head that a model other than a classifier is built on.
    """

    task: ClassVar[str]
    batch_axis: ClassVar[int] = 0
    draws: ClassVar[bool] = False
    backbone_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    spec: ModelSpec
    in_chans: int
    backbone: Any

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Float[Array, "layers"]]:
        """The outputs that `apply` returns, in float32, and the mask density of each layer of the backbone.

        Arguments and errors are those of `training_outputs`.
        """
        outputs, densities = self.training_outputs(images, mask_threshold=mask_threshold, key=key)
        return self.results(outputs), densities

    def training_outputs(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Float[Array, "layers"]]:
        """The outputs that losses read, in float32, and the mask density of each layer of the backbone.

        A key turns training mode on: drop-path drops branches, and batch norm normalises by the batch's statistics and
        updates its running ones.

        Raises:
          InputError: the images do not fit the model, or a castling model in training form has no threshold.
        """
        raise NotImplementedError

    def results(self, outputs: Any) -> Any:
        """Turns the training outputs into the outputs that `apply` returns."""
        raise NotImplementedError

    def features(
        self, images: Float[Array, "batch height width channels"], *, mask_threshold: ArrayLike | None = None
    ) -> list[Float[Array, "batch height width channels"]]:
        """The backbone's tokens on their grid, one map for each stage, finest first."""
        maps: list[Array] = self.backbone.features(images, mask_threshold=mask_threshold)
        return maps

    def __repr__(self) -> str:
        spec = getattr(self, "spec", None)
        if spec is None:
            return type(self).__name__
        words = [f"{word}={value!r}" for word, value in spec.arguments().items() if word != "name"]
        return f"{type(self).__name__}({spec.name!r}, {', '.join(words)})"

    def _checked(self, images: jax.Array) -> jax.Array:
        # Integers are refused and not converted, because they are pixels that nobody has normalised.
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be floating-point numbers from castling_jax.preprocess, not {images.dtype}.")
        if isinstance(jax.tree.leaves(nnx.state(self, nnx.Param))[0], jax.ShapeDtypeStruct):
            raise InputError("this model holds shapes alone: castling_jax.apply(model, variables, images) computes.")
        check(images.shape[3] == self.in_chans, f"images must have {self.in_chans} channels, not {images.shape[3]}.")
        return images
