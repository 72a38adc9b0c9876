"""The augmentations of classification: an image of any size in, float32 of the model's size out, label unchanged."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from castling_jax.data.geometry import View, evaluation_view, is_float, random_resized_crop_box, size_of
from castling_jax.data.pixels import as_floats, color_jitter, normalize_images, random_erasing, random_shift
from castling_jax.data.randaugment import RandAugment, parse_policy
from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing

Example = dict[str, Any]
EIGHT_BITS = ("randaugment", "color_jitter")  # the augmentations that floats cannot have


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The augmentations of training, in their order. All fields but the first are those of a configuration's `augment`.

    Attributes:
      preprocessing: the size and the normalisation; where there is no random crop, the view of evaluation.
    """

    preprocessing: Preprocessing
    crop_scale: tuple[float, float] | None
    flip: float
    randaugment: RandAugment | None
    color_jitter: float
    shift_pixels: int
    erasing: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """{"image", "label"} -> {"image" float32 [image_size, image_size, 3], "label"}.

        Raises:
          InputError: the image cannot be decoded, or is of floats and meant to be changed as only 8 bits can be.
        """
        image = example["image"]
        if is_float(image):
            for name in EIGHT_BITS:
                if getattr(self, name):
                    raise InputError(f"config.augment.{name} is for images of 8 bits, and these are of floats.")
        # Nothing is drawn for what is turned off: to turn one thing on leaves the other draws as they were.
        view = self._draw_view(image, rng)
        seen = view.image(image, self.preprocessing, reduced=self.crop_scale is not None)
        if self.randaugment is not None:
            seen = self.randaugment(seen, rng)
        if self.color_jitter:
            seen = color_jitter(seen, rng, self.color_jitter)
        floats = as_floats(seen)
        if self.shift_pixels:
            floats = random_shift(floats, rng, self.shift_pixels)
        floats = normalize_images(floats, self.preprocessing)
        if self.erasing and rng.random() < self.erasing:
            floats = random_erasing(floats, rng)
        return {"image": floats, "label": example["label"]}

    def _draw_view(self, image: Any, rng: np.random.Generator) -> View:
        options = self.preprocessing
        size = size_of(image, options)
        view = evaluation_view(size, options)
        if self.crop_scale is not None:
            box = random_resized_crop_box(size, self.crop_scale, rng)
            view = View(box, (options.image_size, options.image_size))
        return dataclasses.replace(view, flip=bool(self.flip and rng.random() < self.flip))


def train_transform(augment: ConfigDict, preprocessing: Preprocessing) -> TrainTransform:
    """What is done to an example in training; it can be pickled, and draws from nothing but its second argument.

    Args:
      augment: as `default_config` has it. Repeats and mixing are not a matter of one example.
      preprocessing: the size and the normalisation, and what is done to images without a random crop.

    Raises:
      InputError: a field is out of range.
    """
    fill = tuple(round(255 * value) for value in preprocessing.mean)  # what comes in from outside is the mean color
    return TrainTransform(
        preprocessing=preprocessing,
        crop_scale=None if augment.crop_scale is None else tuple(augment.crop_scale),
        flip=augment.flip,
        randaugment=augment.randaugment and parse_policy(augment.randaugment, fill),
        color_jitter=augment.color_jitter,
        shift_pixels=augment.shift_pixels,
        erasing=augment.erasing,
    )
