"""The augmentations of segmentation: an image of any size and its mask in, the model's size out."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from castling_jax.data.decode import Size
from castling_jax.data.geometry import View, opened, size_of
from castling_jax.data.masks import IGNORED, read_labels
from castling_jax.data.pixels import example_image, random_distortion
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.segmentation.windows import windows_of

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The augmentations of training, in their order. It can be pickled.

    Attributes:
      preprocessing: the size of the result, its normalisation, and how an image is resized.
      scale_range: least and largest factor of the random scale; at 1 the image has the size that evaluation gives it.
        None does not scale.
      flip: the probability of a horizontal flip.
      distort: the probability of each change of colour.
    """

    preprocessing: Preprocessing
    scale_range: tuple[float, float] | None
    flip: float
    distort: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """An example of a data set -> arrays of fixed shapes.

        The scaled image is cropped at random where it is larger than the result. Where it is smaller, it is at the top
        left, and beyond it the mask is IGNORED. There the device gives the image the mean colour, which no 8 bits hold
        exactly.

        Returns:
          "image": uint8 [height, width, 3]; float32 and normalised if the data set's pixels are floats.
          "filled": int32 [2], (height, width) of the part that the image fills.
          "mask": uint8 [height, width].

        Raises:
          InputError: image or mask cannot be decoded, or `read_labels` refuses the mask.
        """
        image, options = opened(example["image"]), self.preprocessing
        size = size_of(image, options)
        labels = read_labels(example, size)

        # Nothing is drawn for what is turned off: to turn one thing on leaves the other draws as they were.
        scale = 1.0 if self.scale_range is None else float(rng.uniform(*self.scale_range))
        # Pixels of the image for one of the result; a longer side goes beyond the result, unless it is squashed.
        rates = [side / seen for side, seen in zip(size, options.shape, strict=True)]
        excess = [rate / min(rates) if options.crop_mode == "slide" else 1.0 for rate in rates]
        sides = zip(size, options.shape, excess, strict=True)
        down, across = (_random_part(side, seen, scale * more, rng) for side, seen, more in sides)
        box = (down[0], across[0], down[1], across[1])
        view = View(box, (down[2], across[2]), flip=bool(self.flip and rng.random() < self.flip))
        pixels = np.asarray(view.image(image, options, reduced=True))
        if self.distort:
            pixels = random_distortion(pixels, rng, self.distort)
        beyond = [(0, whole - seen) for whole, seen in zip(options.shape, view.size, strict=True)]
        return {
            "image": np.pad(example_image(pixels, options), (*beyond, (0, 0))),
            "filled": np.array(view.size, np.int32),
            "mask": np.pad(view.mask(labels), beyond, constant_values=IGNORED),
        }


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Evaluation's transform of an example: what the model sees of the image, and the mask as it is. It can be pickled.

    Attributes:
      preprocessing: the size that the model sees, and its normalisation; with crop_mode "slide", in windows.
      mask_size: (height, width) that every mask is padded to, because a batch has one shape; None leaves masks out.
      most_windows: the number of windows of every example, for the same reason: an image with fewer repeats one, which
        then lies beyond the mask and does not count. 0 for as many as the image has.
    """

    preprocessing: Preprocessing
    mask_size: Size | None = None
    most_windows: int = 0

    def __call__(self, example: Example) -> Example:
        """An example of a data set -> arrays.

        Returns:
          "image": as in training; [windows, height, width, 3] with crop_mode "slide".
          "windows": float32 [windows, 4], the part of the image that each shows, as `windows_of` returns it.
          "size": int32 [2], (height, width) of the image itself.
          "mask": uint8, if there is a mask_size.

        Raises:
          InputError: image or mask cannot be decoded, or `read_labels` refuses the mask.
        """
        options = self.preprocessing
        size = size_of(example["image"], options)
        windows = windows_of(size, options)
        views = [View(window, options.shape) for window in windows]
        # Each window opens the image anew, because reading its pixels may change what Pillow says of its orientation.
        seen = [example_image(view.image(example["image"], options), options) for view in views]
        lacking = max(self.most_windows - len(windows), 0)
        rows, _ = self.mask_size or size
        windows += [(rows + 1, 0, 1, 1)] * lacking
        seen += seen[:1] * lacking
        images = np.stack(seen) if options.crop_mode == "slide" else seen[0]
        result = {"image": images, "windows": np.array(windows, np.float32), "size": np.array(size, np.int32)}
        if self.mask_size is not None:
            beyond = [(0, whole - side) for whole, side in zip(self.mask_size, size, strict=True)]
            result["mask"] = np.pad(read_labels(example, size), beyond, constant_values=IGNORED)
        return result


def train_transform(augment: ConfigDict, preprocessing: Preprocessing) -> TrainTransform:
    """What is done to an example in training, as the group `augment` of a configuration says."""
    scale_range = None if augment.scale_range is None else tuple(augment.scale_range)
    return TrainTransform(preprocessing, scale_range, augment.flip, augment.distort)


def _random_part(side: int, model_side: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: (first pixel that is seen, number of pixels that are seen, pixels of the result for them)."""
    if scale < 1:  # the whole image, smaller than the result
        return 0, side, max(round(scale * model_side), 1)
    seen = max(round(side / scale), 1)
    return int(rng.integers(side - seen + 1)), seen, model_side
