"""How an image becomes a model's input: a value kept beside the weights, which `castling_jax.preprocess` takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from castling_jax.errors import InputError, check_known
from castling_jax.fields import FLAG, IMAGE_SIZE, number, numbers, one_of, plain
from castling_jax.sizes import ImageSize, image_shape

VALUES = {
    "image_size": IMAGE_SIZE,
    "channels": one_of("RGB"),
    "mean": numbers(3, "three finite numbers", lambda _: True),
    "std": numbers(3, "three finite numbers above 0", lambda values: min(values) > 0),
    "crop_ratio": number("(0, 1]"),
    "crop_mode": one_of("center", "squash", "slide"),
    "interpolation": one_of("bicubic", "bilinear"),  # Pillow's, antialiased
    "exif": FLAG,
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image.

    The image is resized to image_size / crop_ratio, and the central image_size pixels are cut out. Then each channel,
    in [0, 1], becomes (value - mean) / std. An image that already has image_size is only normalised.

    Attributes:
      image_size: size of the result in pixels: one number for height and width, or (height, width).
      channels: the result's channels, always "RGB". A grey image is repeated in all three; transparency is dropped.
      mean: each channel's mean, subtracted.
      std: each channel's standard deviation, a divisor.
      crop_ratio: share of the resized image's side that is kept.
      crop_mode: how an image of another aspect ratio becomes the model's input, by timm's names: "center" keeps its
        aspect ratio and covers the size, so that what is beyond the size on one axis is cut off; "squash" gives it the
        aspect ratio of image_size. "slide" is for segmenters: the image covers the size as with "center", and the model
        sees all of it, in windows of image_size.
      interpolation: "bicubic" or "bilinear".
      exif: whether an image is turned as its EXIF orientation says.

    Raises:
      InputError: a value is out of range.
    """

    image_size: ImageSize
    channels: str = "RGB"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_ratio: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    exif: bool = False

    def __post_init__(self) -> None:
        for name, values in VALUES.items():
            # JSON brings lists, and a frozen value with a list in it could not be hashed.
            value = plain(getattr(self, name))
            values.check(name, value)
            object.__setattr__(self, name, tuple(map(float, value)) if name in ("mean", "std") else value)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the result in pixels."""
        return image_shape(self.image_size)

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
            check_known("attribute of the preprocessing", name, VALUES)
        return cls(**fields)
