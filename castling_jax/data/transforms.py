"""What is done to one example: an image of any size in, float32 of the model's size out, with the randomness given.

An example is {"image", "label"}; its image is encoded or uint8, as decode.py takes it, or float32 in [0, 1], which is
cropped and resized as those are, but not given to operations on 8 bits.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Num
from ml_collections import ConfigDict
from PIL import Image as PillowImage
from PIL import ImageEnhance

from castling_jax.data.decode import Box, decode, image_size, read_crop
from castling_jax.data.randaugment import RandAugment, parse_policy
from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing

Image = Float[np.ndarray, "height width 3"]
Example = dict[str, Any]
TRIES = 10  # that a random box of an area and an aspect ratio has to fit into the image
CROP_RATIOS = (3 / 4, 4 / 3)  # width / height
ERASED_AREAS = (0.02, 1 / 3)
ERASED_RATIOS = (0.3, 1 / 0.3)  # height / width


def random_shift(image: Image, rng: np.random.Generator, pixels: int) -> Image:
    """Moves the image by up to `pixels` along each axis; what comes in from outside is zero."""
    height, width, _ = image.shape
    row, column = rng.integers(0, 2 * pixels + 1, size=2)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    return padded[row : row + height, column : column + width]


def normalize_images(images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing) -> Any:
    """(images - mean) / std, channel by channel, which is what models take; a data set's own give mean 0 and std 1.

    Training, evaluation, `preprocess` and what checks an exported program all normalise by this function.

    Args:
      images: [..., height, width, 3], of NumPy or JAX: uint8, which is divided by 255 first, or floats in [0, 1].
      preprocessing: has the channels' mean and std, in [0, 1]. Nothing is resized.

    Returns:
      Floats of the same shape; float32, or float64 of float64.

    Raises:
      InputError: the images are of another dtype, or do not have three channels.
    """
    if images.ndim < 3 or images.shape[-1] != 3:
        raise InputError(f"images must be [..., height, width, 3], not of shape {images.shape}.")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    elif np.dtype(images.dtype).kind not in "fV":  # V: bfloat16
        raise InputError(f"images must be uint8, or floats in [0, 1], not {images.dtype}.")
    # Row by row: numpy is slow where the last axis has three entries only.
    rows = images.reshape(*images.shape[:-2], -1)
    means, stds = (
        np.tile(np.asarray(values, np.float32), images.shape[-2]) for values in (preprocessing.mean, preprocessing.std)
    )
    return ((rows - means) / stds).reshape(images.shape)


def denormalize_images(
    images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "*batch height width 3"]:
    """The images that `normalize_images` was given, in [0, 1], for pictures; values beyond are clipped."""
    return np.clip(np.asarray(images) * np.asarray(preprocessing.std) + np.asarray(preprocessing.mean), 0, 1)


def random_resized_crop_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box of a random area and aspect ratio (Szegedy et al., arXiv 1409.4842), as torchvision and timm draw it.

    Args:
      size: (height, width) of the image.
      scale: between which shares of the image's area.
      rng: what is drawn from.

    Returns:
      (top, left, height, width). Where no draw fits, what is in the image's middle: all of it but what makes it longer
      or higher than the aspect ratio may be.
    """
    height, width = size
    for _ in range(TRIES):
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1)), down, across
    down = min(height, round(width / CROP_RATIOS[0]))
    across = min(width, round(height * CROP_RATIOS[1]))
    return (height - down) // 2, (width - across) // 2, down, across


def center_crop_box(size: tuple[int, int], side: int, crop_ratio: float) -> Box:
    """What becomes side x side when an image's short side is resized to side / crop_ratio and its middle cut out.

    Sizes are rounded as in torchvision's Resize and CenterCrop, which timm's evaluation consists of.
    """
    height, width = size
    short = math.floor(side / crop_ratio)
    down, across = (int(short * length / min(size)) for length in size)
    top, left = round((down - side) / 2), round((across - side) / 2)
    return top * height / down, left * width / across, side * height / down, side * width / across


def color_jitter(image: PillowImage.Image, rng: np.random.Generator, strength: float) -> PillowImage.Image:
    """Brightness, contrast and saturation in a random order, each times up to 1 +- strength, as torchvision's does."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for chosen in rng.permutation(3):
        image = enhancers[chosen](image).enhance(factors[chosen])
    return image


def random_erasing(image: Image, rng: np.random.Generator) -> Image:
    """Puts normal noise in the place of a random box (Zhong et al., arXiv 1708.04896); timm's mode "pixel".

    Args:
      image: normalised.
      rng: what is drawn from.
    """
    height, width, channels = image.shape
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREAS) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASED_RATIOS)))
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if down < height and across < width:
            top, left = rng.integers(height - down + 1), rng.integers(width - across + 1)
            erased = image.copy()
            noise = rng.standard_normal((down, across, channels), np.float32)
            erased[top : top + down, left : left + across] = noise
            return erased
    return image


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What `preprocessing` says; JPEGs are decoded at their full scale."""

    preprocessing: Preprocessing

    def __call__(self, example: Example) -> Example:
        """{"image", "label"} -> {"image" float32 [image_size, image_size, 3], "label"}.

        Raises:
          InputError: the image cannot be decoded.
        """
        image = np.asarray(self.read(example["image"]))
        return {"image": normalize_images(image, self.preprocessing), "label": example["label"]}

    def read(self, image: Any) -> PillowImage.Image | Image:
        """The image at its size; floats stay floats."""
        options = self.preprocessing
        side, size = (options.image_size, options.image_size), _size(image, options)
        if size == side:
            return image if _is_float(image) else decode(image, exif=options.exif)
        return _crop(image, center_crop_box(size, options.image_size, options.crop_ratio), options, reduced=False)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The augmentations of training, in their order; the fields are those of `augment` in a configuration."""

    resize: EvalTransform  # where there is no random crop
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
        image = self._read(example["image"], rng)
        # Nothing is drawn for what is turned off: to turn one thing on leaves the other draws as they were.
        if self.flip and rng.random() < self.flip:
            image = np.fliplr(image) if _is_float(image) else image.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment is not None:
            image = self.randaugment(image, rng)
        if self.color_jitter:
            image = color_jitter(image, rng, self.color_jitter)
        floats = _as_floats(image)
        if self.shift_pixels:
            floats = random_shift(floats, rng, self.shift_pixels)
        floats = normalize_images(floats, self.resize.preprocessing)
        if self.erasing and rng.random() < self.erasing:
            floats = random_erasing(floats, rng)
        return {"image": floats, "label": example["label"]}

    def _read(self, image: Any, rng: np.random.Generator) -> Any:
        if _is_float(image):
            for name in ("randaugment", "color_jitter"):
                if getattr(self, name):
                    raise InputError(f"config.augment.{name} is for images of 8 bits, and these are of floats.")
        if self.crop_scale is None:
            return self.resize.read(image)
        options = self.resize.preprocessing
        box = random_resized_crop_box(_size(image, options), self.crop_scale, rng)
        return _crop(image, box, options, reduced=True)


def train_transform(augment: ConfigDict, preprocessing: Preprocessing) -> TrainTransform:
    """What is done to an example in training; it can be pickled, and draws from nothing but its second argument.

    Args:
      augment: as `default_config` has it; what it says of repeats and mixing is for others.
      preprocessing: the size and the normalisation; and what is done to images for want of a random crop.

    Raises:
      InputError: a field is out of range.
    """
    fill = tuple(round(255 * value) for value in preprocessing.mean)  # what comes in from outside is the mean color
    return TrainTransform(
        resize=EvalTransform(preprocessing),
        crop_scale=None if augment.crop_scale is None else tuple(augment.crop_scale),
        flip=augment.flip,
        randaugment=augment.randaugment and parse_policy(augment.randaugment, fill),
        color_jitter=augment.color_jitter,
        shift_pixels=augment.shift_pixels,
        erasing=augment.erasing,
    )


def _is_float(image: Any) -> bool:
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)


def _size(image: Any, options: Preprocessing) -> tuple[int, int]:
    return image.shape[:2] if _is_float(image) else image_size(image, exif=options.exif)


def _crop(image: Any, box: Box, options: Preprocessing, *, reduced: bool) -> PillowImage.Image | Image:
    """`read_crop` to the model's size, of an image that may be of floats, whose channels Pillow resizes one by one."""
    size = (options.image_size, options.image_size)
    if not _is_float(image):
        return read_crop(image, box, size, options.interpolation, exif=options.exif, reduced=reduced)
    resampling = PillowImage.Resampling[options.interpolation.upper()]
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    channels = [PillowImage.fromarray(np.ascontiguousarray(image[..., channel], np.float32)) for channel in range(3)]
    resized = [channel.resize(size, resampling, corners) for channel in channels]
    # As 8 bits are clipped where the filter overshoots.
    return np.stack([np.asarray(channel) for channel in resized], -1).clip(0, 1)


def _as_floats(image: PillowImage.Image | Image) -> Image:
    return image if isinstance(image, np.ndarray) else np.asarray(image, np.float32) / np.float32(255)
