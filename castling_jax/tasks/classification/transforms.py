"""The augmentations of classification: an image of any size in, pixels of the model's size out."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from castling_jax.data.geometry import View, evaluation_view, is_float, opened, random_resized_crop_box, size_of
from castling_jax.data.pixels import color_jitter, example_image, random_erased_box, random_shift
from castling_jax.data.randaugment import RandAugment, parse_policy
from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.task import Example

EIGHT_BITS = ("randaugment", "color_jitter")  # the augmentations that need images of 8 bits


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The augmentations of training, in the order in which they are applied.

    All fields but the first come from the group `augment` of a configuration.

    Attributes:
      preprocessing: the model's image size and normalisation, and the part of an image that is seen without a random
        crop.
    """

    preprocessing: Preprocessing
    crop_scale: tuple[float, float] | None
    flip: float
    randaugment: RandAugment | None
    color_jitter: float
    shift_pixels: int
    erasing: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """An example of a data set -> arrays of fixed shapes.

        Returns:
          "image": uint8 [height, width, 3]; float32 and normalised if the data set's pixels are floats.
          "label": the class's number.
          "erased": int32 [4], the box that the device fills with noise, as `random_erased_box` returns it; only if
            `erasing` is above 0.

        Raises:
          InputError: the image cannot be decoded, or it has float pixels and an augmentation needs 8 bits.
        """
        image = opened(example["image"])
        if is_float(image):
            for name in EIGHT_BITS:
                if getattr(self, name):
                    raise InputError(f"config.augment.{name} needs images of 8 bits, but these have float pixels.")
        # An augmentation that is off draws no numbers: the draws of a configuration depend only on those that it uses.
        view = self._draw_view(image, rng)
        # Without a random crop the image has to be exactly the one that evaluation sees, so JPEGs are decoded in full.
        seen = view.image(image, self.preprocessing, reduced=self.crop_scale is not None)
        if self.randaugment is not None:
            seen = self.randaugment(seen, rng)
        if self.color_jitter:
            seen = color_jitter(seen, rng, self.color_jitter)
        pixels = np.asarray(seen)
        if self.shift_pixels:
            pixels = random_shift(pixels, rng, self.shift_pixels)
        result = {"image": example_image(pixels, self.preprocessing), "label": example["label"]}
        if self.erasing:
            is_erased = rng.random() < self.erasing
            box = random_erased_box(pixels.shape[:2], rng) if is_erased else np.zeros(4, np.int32)
            result["erased"] = box
        return result

    def _draw_view(self, image: Any, rng: np.random.Generator) -> View:
        options = self.preprocessing
        size = size_of(image, options)
        view = evaluation_view(size, options)
        if self.crop_scale is not None:
            box = random_resized_crop_box(size, self.crop_scale, rng)
            view = View(box, options.shape)
        return dataclasses.replace(view, flip=bool(self.flip and rng.random() < self.flip))


def train_transform(augment: ConfigDict, preprocessing: Preprocessing) -> TrainTransform:
    """Builds the transform of a training example; it can be pickled, and is random only through its second argument.

    Args:
      augment: the group `augment` of a configuration. Its repeats and mixing concern batches and are not used here.
      preprocessing: as in `TrainTransform`.

    Raises:
      InputError: a field is out of range.
    """
    fill = tuple(round(255 * value) for value in preprocessing.mean)  # pixels from outside the image are the mean color
    return TrainTransform(
        preprocessing=preprocessing,
        crop_scale=None if augment.crop_scale is None else tuple(augment.crop_scale),
        flip=augment.flip,
        randaugment=augment.randaugment and parse_policy(augment.randaugment, fill),
        color_jitter=augment.color_jitter,
        shift_pixels=augment.shift_pixels,
        erasing=augment.erasing,
    )
