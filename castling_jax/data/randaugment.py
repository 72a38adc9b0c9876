"""RandAugment (Cubuk et al., arXiv 1909.13719) with timm's policy strings, on Pillow images.

The operations are timm's "increasing" ones (`inc1`): a larger magnitude changes the image more. Magnitudes are in
[0, 10].
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from castling_jax.errors import InputError

MAX_MAGNITUDE = 10
Color = tuple[int, ...]  # red, green, blue


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of RandAugment.

    Attributes:
      apply: (image, argument, fill color for pixels from outside the image) -> image.
      argument: magnitude -> argument of `apply`.
      signed: whether the argument is negated in half of the draws.
    """

    apply: Callable[[Image.Image, Any, Color], Image.Image]
    argument: Callable[[float], Any] = lambda magnitude: None
    signed: bool = False


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]], most: float) -> Operation:
    """An affine operation: (image, amount) -> its matrix, with an amount of up to `most` in either direction."""

    def apply(image: Image.Image, amount: float, fill: Color) -> Image.Image:
        kind, resample = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        return image.transform(image.size, kind, matrix(image, amount), resample=resample, fillcolor=fill)

    return Operation(apply, lambda magnitude: magnitude / MAX_MAGNITUDE * most, signed=True)


def _rotate(image: Image.Image, degrees: float, fill: Color) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, bits: int, fill: Color) -> Image.Image:
    """Keeps the upper `bits`, from 4 down to 0. ImageOps.posterize would not do: Pillow 13's refuses 0 bits, black."""
    return image.point([value >> (8 - bits) << (8 - bits) for value in range(256)] * 3)


def _solarize_add(image: Image.Image, amount: int, fill: Color) -> Image.Image:
    """Adds `amount` to values below 128."""
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def _enhance(enhancer: Any) -> Operation:
    """Moves the image towards its grey, black or blurred form (a change below 0), or away from it."""
    return Operation(
        lambda image, change, fill: enhancer(image).enhance(max(0.1, 1 + change)),
        lambda magnitude: magnitude / MAX_MAGNITUDE * 0.9,
        signed=True,
    )


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _, fill: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _, fill: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _, fill: ImageOps.invert(image)),
    "Rotate": Operation(_rotate, lambda magnitude: magnitude / MAX_MAGNITUDE * 30, signed=True),  # degrees
    "Posterize": Operation(_posterize, lambda magnitude: 4 - int(magnitude / MAX_MAGNITUDE * 4)),
    # Values from the threshold on are inverted: none at 256, all at 0.
    "Solarize": Operation(
        lambda image, threshold, fill: ImageOps.solarize(image, threshold),
        lambda magnitude: 256 - int(magnitude / MAX_MAGNITUDE * 256),
    ),
    "SolarizeAdd": Operation(_solarize_add, lambda magnitude: int(magnitude / MAX_MAGNITUDE * 110)),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda image, shear: (1, shear, 0, 0, 1, 0), 0.3),
    "ShearY": _affine(lambda image, shear: (1, 0, 0, shear, 1, 0), 0.3),
    "TranslateX": _affine(lambda image, share: (1, 0, share * image.width, 0, 1, 0), 0.45),
    "TranslateY": _affine(lambda image, share: (1, 0, 0, 0, 1, share * image.height), 0.45),
}
_NAMES = tuple(OPERATIONS)
_SECTION = re.compile(r"(m)(\d|10)|(n)([1-9]\d*)|(p)(1|0?\.\d+)|(mstd)(\d{1,2}|\d{0,2}\.\d+)|(inc)(1)")


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies operations drawn with replacement, one after the other.

    Attributes:
      fill: color of pixels from outside the image.
      magnitude: mean of the magnitudes.
      magnitude_std: standard deviation of the magnitudes, which are normal and clipped to [0, 10].
      layers: number of operations that are drawn.
      probability: probability that a drawn operation is applied.
    """

    fill: Color
    magnitude: int = MAX_MAGNITUDE
    magnitude_std: float = 0.0
    layers: int = 2
    probability: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Applies the drawn operations to an RGB image."""
        for index in rng.integers(len(_NAMES), size=self.layers):
            # Skipped operations still count as drawn, as in timm: on average layers * probability are applied.
            if rng.random() < self.probability:
                magnitude = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, MAX_MAGNITUDE))
                image = apply_operation(_NAMES[index], image, magnitude, rng.random() < 0.5, self.fill)
        return image


def apply_operation(name: str, image: Image.Image, magnitude: float, negative: bool, fill: Color) -> Image.Image:
    """Applies one of OPERATIONS at a magnitude in [0, 10]; if it is signed, `negative` chooses the other direction."""
    operation = OPERATIONS[name]
    argument = operation.argument(magnitude)
    return operation.apply(image, -argument if operation.signed and negative else argument, fill)


def parse_policy(policy: str, fill: Color) -> RandAugment:
    """ "rand-m9-mstd0.5-inc1" -> RandAugment. m, n, p, mstd: magnitude, layers, probability, magnitude_std.

    Raises:
      InputError: the string has another form, a number is out of range, or inc1 is missing. Without inc1, timm uses
        other operations, some of which change less at a larger magnitude; they are not implemented.
    """
    kind, *sections = policy.split("-")
    matches = [_SECTION.fullmatch(section) for section in sections]
    # _SECTION has two groups for each kind of section, (name)(value); the others are None.
    values = dict(tuple(filter(None, match.groups())) for match in matches if match)
    if kind != "rand" or None in matches or "inc" not in values:
        raise InputError(
            f"a RandAugment policy must look like 'rand-m9-mstd0.5-inc1' or 'rand-m9-n6-mstd0.5-inc1', with inc1, "
            f"m up to {MAX_MAGNITUDE}, n of at least 1, p up to 1 and mstd below 100, not {policy!r}."
        )
    magnitude, layers = (int(values.get(name, default)) for name, default in (("m", MAX_MAGNITUDE), ("n", 2)))
    return RandAugment(fill, magnitude, float(values.get("mstd", 0)), layers, float(values.get("p", 0.5)))
