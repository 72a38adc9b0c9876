"""How an image becomes a model's input: a value that is kept beside the weights. `castling_jax.preprocess` does it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from castling_jax.errors import InputError, check_known

CHANNELS = "RGB"
INTERPOLATIONS = ("bicubic", "bilinear")  # Pillow's, antialiased


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image.

    The short side is resized to image_size / crop_ratio, and the middle image_size x image_size is cut out. Then each
    channel, in [0, 1], becomes (value - mean) / std. An image that is image_size x image_size is only normalised.

    Attributes:
      image_size: height and width of the result in pixels.
      channels: of the result, in their order: "RGB" always. Grey images are repeated, transparency is dropped.
      mean: of each channel.
      std: of each channel.
      crop_ratio: share of the short side that is kept.
      interpolation: "bicubic" or "bilinear".
      exif: whether an image is turned as its EXIF orientation says.

    Raises:
      InputError: a value is none of these.
    """

    image_size: int
    channels: str = CHANNELS
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    exif: bool = False

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise InputError(f"image_size must be an integer of at least 1, not {self.image_size!r}.")
        check_known("channels", self.channels, (CHANNELS,))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise InputError(f"std must be three numbers above 0, not {self.std}.")
        if not (_is_number(self.crop_ratio) and 0 < self.crop_ratio <= 1):
            raise InputError(f"crop_ratio must be a number in (0, 1], not {self.crop_ratio!r}.")
        check_known("interpolation", self.interpolation, INTERPOLATIONS)
        if type(self.exif) is not bool:
            raise InputError(f"exif must be True or False, not {self.exif!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The attributes, plain enough for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`.

        Raises:
          InputError: an attribute is unknown, image_size is missing, or a value is not allowed.
        """
        if not isinstance(fields, Mapping) or "image_size" not in fields:
            raise InputError(f"preprocessing must be an object with an image_size, not {str(fields)[:100]!r}.")
        for name in fields:
            check_known("attribute of the preprocessing", name, [field.name for field in dataclasses.fields(cls)])
        return cls(**fields)


def _three_numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, tuple | list) or len(values) != 3 or not all(map(_is_number, values)):
        raise InputError(f"{name} must be three finite numbers, not {str(values)[:100]}.")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
