"""The augmentations of detection: an image of any size and its boxes in, the model's size and fixed shapes out."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from castling_jax.data.annotations import Boxes, check_size, clip_boxes
from castling_jax.data.decode import Box, Size
from castling_jax.data.geometry import View, opened, size_of
from castling_jax.data.loader import OneOf
from castling_jax.data.loader import TrainTransform as AnyTrainTransform
from castling_jax.data.pixels import example_image, random_distortion
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import image_shape

Example = dict[str, Any]
# The random crop of SSD (Liu et al., arXiv 1512.02325, section 2.2), with the numbers of PaddleDetection's RandomCrop.
OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # what the crop's best IoU with a box is at least; None is no crop
CROP_SCALES = (0.3, 1.0)  # of the crop's sides over the image's, as their geometric mean
CROP_ASPECTS = (0.5, 2.0)  # of the crop's width / height over the image's
CROP_TRIES = 50  # for each overlap


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The augmentations of training, in their order. It can be pickled.

    Attributes:
      preprocessing: the normalisation, and how an image is resized.
      size: (height, width) of the result; the aspect ratio is not kept.
      box_crop: whether a random crop comes first.
      flip: the probability of a horizontal flip.
      distort: the probability of each change of colour.
      max_boxes: how many boxes the result has room for.
    """

    preprocessing: Preprocessing
    size: Size
    box_crop: bool
    flip: float
    distort: float
    max_boxes: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """An example of a data set -> arrays of fixed shapes.

        Crowds are left out. So is a box whose centre is outside the crop, and what is beyond max_boxes.

        Returns:
          {"image": uint8 [height, width, 3], or float32 and normalised if the data set's pixels are floats, "boxes":
          float32 [max_boxes, 4], x0, y0, x1, y1 in its pixels, "classes": int32 [max_boxes], "valid": bool
          [max_boxes]}; rows that are not valid are zero.

        Raises:
          InputError: the image cannot be decoded, or its size is not what the annotations say.
        """
        image = opened(example["image"])
        size = size_of(image, self.preprocessing)
        check_size(size, example)
        kept = ~example["crowd"]
        boxes, classes = example["boxes"][kept], example["classes"][kept]

        whole = (0, 0, *size)
        # Nothing is drawn for what is turned off: to turn one thing on leaves the other draws as they were.
        box = random_box_crop(size, boxes, rng) if self.box_crop else whole
        view = View(box, self.size, flip=bool(self.flip and rng.random() < self.flip))
        seen = view.image(image, self.preprocessing, reduced=True)
        moved, has_area = clip_boxes(view.boxes(boxes), self.size)
        kept = has_area & _has_centers(np.array([box]), boxes)[0]

        # The view's pixels are as many as the model takes, and often fewer than the image's.
        pixels = np.asarray(seen)
        if self.distort:
            pixels = random_distortion(pixels, rng, self.distort)
        result = {
            "image": example_image(pixels, self.preprocessing),
            "boxes": np.zeros((self.max_boxes, 4), np.float32),
            "classes": np.zeros(self.max_boxes, np.int32),
            "valid": np.arange(self.max_boxes) < kept.sum(),
        }
        for name, values in (("boxes", moved[kept]), ("classes", classes[kept])):
            result[name][: len(values)] = values[: self.max_boxes]
        return result


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What evaluation does to an example: a plain resize to `size`, (height, width). It can be pickled."""

    preprocessing: Preprocessing
    size: Size

    def __call__(self, example: Example) -> Example:
        """{"image": as in training, "size": int32 [2], (height, width) of the image itself}.

        Raises:
          InputError: the image cannot be decoded, or its size is not what the annotations say.
        """
        image = opened(example["image"])
        size = size_of(image, self.preprocessing)
        check_size(size, example)
        seen = View((0, 0, *size), self.size).image(image, self.preprocessing)
        return {"image": example_image(seen, self.preprocessing), "size": np.array(size, np.int32)}


def train_transform(augment: ConfigDict, preprocessing: Preprocessing) -> AnyTrainTransform:
    """What is done to an example in training; it can be pickled, and draws from nothing but its second argument.

    Args:
      augment: as `default_config` has it. With several image_sizes, each step has one of them.
      preprocessing: the size, where augment.image_sizes is None, and the normalisation.
    """
    sizes = [image_shape(side) for side in augment.image_sizes or ()] or [preprocessing.shape]
    fields = {name: augment[name] for name in ("box_crop", "flip", "distort", "max_boxes")}
    transforms = [TrainTransform(preprocessing, size, **fields) for size in sizes]
    return transforms[0] if len(transforms) == 1 else OneOf(tuple(transforms))


def eval_transform(preprocessing: Preprocessing) -> EvalTransform:
    """What is done to an example in an evaluation."""
    return EvalTransform(preprocessing, preprocessing.shape)


def random_box_crop(size: Size, boxes: Boxes, rng: np.random.Generator) -> Box:
    """A crop that overlaps with a box by at least one of OVERLAPS, drawn, and that has a box's centre in it.

    Where no try fits an overlap, another one is drawn, until it is None. An image without boxes is not cropped.

    Args:
      size: (height, width) of the image.
      boxes: in its pixels.
      rng: what is drawn from.

    Returns:
      (top, left, height, width), whole pixels.
    """
    whole = (0, 0, *size)
    if not len(boxes):
        return whole
    for choice in rng.permutation(len(OVERLAPS)):
        overlap = OVERLAPS[choice]
        if overlap is None:
            break
        scale = rng.uniform(*CROP_SCALES, size=CROP_TRIES)
        # No side becomes longer than the image's.
        low, high = np.maximum(CROP_ASPECTS[0], scale**2), np.minimum(CROP_ASPECTS[1], scale**-2)
        aspect = rng.uniform(low, high)
        shares = np.stack([scale / np.sqrt(aspect), scale * np.sqrt(aspect)], axis=-1)
        sides = np.maximum(np.floor(shares * size + 1e-9), 1).astype(int)  # 1e-9: a share of 1 that was rounded down
        corners = rng.integers(np.array(size) - sides + 1)
        crops = np.concatenate([corners, sides], axis=-1)
        fits = (_overlaps(crops, boxes).max(1) >= overlap) & _has_centers(crops, boxes).any(1)
        if fits.any():
            top, left, height, width = crops[fits.argmax()].tolist()
            return top, left, height, width
    return whole


def _overlaps(crops: np.ndarray, boxes: Boxes) -> np.ndarray:
    """The IoU of each crop (top, left, height, width) and each box, [crops, boxes]."""
    top_left, sides = crops[:, None, 1::-1], crops[:, None, :1:-1]  # x before y
    shared = np.minimum(top_left + sides, boxes[:, 2:]) - np.maximum(top_left, boxes[:, :2])
    intersection = np.prod(np.maximum(shared, 0), axis=-1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    return intersection / (np.prod(sides, axis=-1) + areas - intersection)


def _has_centers(crops: np.ndarray, boxes: Boxes) -> Bool[np.ndarray, "crops boxes"]:
    """Whether the centre of each box is inside each crop (top, left, height, width), not on its border."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    top_left, sides = crops[:, None, 1::-1], crops[:, None, :1:-1]
    return ((centers > top_left) & (centers < top_left + sides)).all(-1)
