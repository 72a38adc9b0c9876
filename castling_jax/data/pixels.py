"""Operations on the pixels of one image; the caller passes the random generator. geometry.py chooses the visible part.

Images are float32 in [0, 1], or Pillow images for operations on 8 bits.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Num
from PIL import Image as PillowImage
from PIL import ImageEnhance

from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing

Image = Float[np.ndarray, "height width 3"]
TRIES = 10  # draws of a box to erase; if no box fits into the image, nothing is erased
ERASED_AREAS = (0.02, 1 / 3)  # the box's area / the image's area
ERASED_RATIOS = (0.3, 1 / 0.3)  # height / width
# SSD's changes of colour: the smallest and the largest factor, and the largest turn of the hue.
DISTORTION, HUE_DEGREES = (0.5, 1.5), 18.0
# NTSC's brightness (Y) and two axes of colour (I, Q), each as weights of red, green and blue. Pillow's grey is Y.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def random_shift(image: Image, rng: np.random.Generator, pixels: int) -> Image:
    """Moves the image by up to `pixels` along each axis; pixels from outside the image are zero."""
    height, width, _ = image.shape
    row, column = rng.integers(0, 2 * pixels + 1, size=2)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    return padded[row : row + height, column : column + width]


def normalize_images(images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing) -> Any:
    """Turns pixels into a model's input: (images - mean) / std, channel by channel.

    Training, evaluation, `preprocess` and the check of an exported program all use this function. With the statistics
    of a data set as mean and std, its pixels get mean 0 and standard deviation 1.

    Args:
      images: NumPy or JAX array [..., height, width, 3]: uint8, which is divided by 255 first, or floats in [0, 1].
      preprocessing: gives mean and std, for pixels in [0, 1]. Its other fields are not used: nothing is resized.

    Returns:
      Floats of the same shape: float64 for float64 images, else float32.

    Raises:
      InputError: the images have another dtype, or not three channels.
    """
    if images.ndim < 3 or images.shape[-1] != 3:
        raise InputError(f"images must be [..., height, width, 3], not of shape {images.shape}.")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    elif np.dtype(images.dtype).kind not in "fV":  # V: bfloat16
        raise InputError(f"images must be uint8, or floats in [0, 1], not {images.dtype}.")
    # Row by row: NumPy is slow when the last axis has only three entries.
    rows = images.reshape(*images.shape[:-2], -1)
    means, stds = (
        np.tile(np.asarray(values, np.float32), images.shape[-2]) for values in (preprocessing.mean, preprocessing.std)
    )
    return ((rows - means) / stds).reshape(images.shape)


def denormalize_images(
    images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "*batch height width 3"]:
    """Inverts `normalize_images`, for pictures; values outside [0, 1] are clipped."""
    return np.clip(np.asarray(images) * np.asarray(preprocessing.std) + np.asarray(preprocessing.mean), 0, 1)


def color_jitter(image: PillowImage.Image, rng: np.random.Generator, strength: float) -> PillowImage.Image:
    """Changes brightness, contrast and saturation by up to 1 +- strength, in random order, as torchvision does."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for index in rng.permutation(3):
        image = enhancers[index](image).enhance(factors[index])
    return image


def as_floats(image: PillowImage.Image | Image) -> Image:
    """A Pillow image as float32 in [0, 1]; an array is returned as it is."""
    return image if isinstance(image, np.ndarray) else np.asarray(image, np.float32) / np.float32(255)


def random_distortion(image: Image, rng: np.random.Generator, probability: float) -> Image:
    """Changes brightness, contrast, saturation and hue in a random order, each with this probability.

    These are SSD's changes (Liu et al., arXiv 1512.02325, section 2.2). The first three are those of Pillow's
    `ImageEnhance`; the hue turns in the plane of I and Q, which keeps the brightness. Each change is an affine map of a
    pixel's channels, so all of them together are one matrix and one offset. Values are clipped to [0, 1] at the end.
    """
    grey, turn = YIQ[0], np.deg2rad(rng.uniform(-HUE_DEGREES, HUE_DEGREES))
    brightness, contrast, saturation = rng.uniform(*DISTORTION, size=3)
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    matrices = (
        brightness * np.eye(3),
        contrast * np.eye(3),
        saturation * np.eye(3) + (1 - saturation) * grey,  # each row: towards the pixel's grey
        np.linalg.inv(YIQ) @ rotation @ YIQ,
    )
    is_on = rng.random(4) < probability
    if not is_on.any():
        return image
    mean = image.mean(0).mean(0, dtype=np.float64)
    change, offset = np.eye(3), np.zeros(3)
    for chosen in rng.permutation(4):
        if is_on[chosen]:
            change, offset = matrices[chosen] @ change, matrices[chosen] @ offset
            # Contrast moves pixels towards the image's mean grey before this change, which is the mean grey after it
            # divided by `contrast`.
            if chosen == 1:
                offset = offset + (1 - contrast) / contrast * (grey @ (change @ mean + offset))
    # Channel by channel, not as a matrix product: BLAS would start threads of its own in each of the loader's threads.
    changed = np.empty_like(image)
    channels = [image[..., channel] for channel in range(3)]
    for channel, (weights, shift) in enumerate(zip(change.astype(np.float32), offset.astype(np.float32), strict=True)):
        changed[..., channel] = sum(weight * values for weight, values in zip(weights, channels, strict=True)) + shift
    return changed.clip(0, 1, out=changed)


def random_erasing(image: Image, rng: np.random.Generator) -> Image:
    """Replaces a random box by normal noise (Zhong et al., arXiv 1708.04896), as timm's mode "pixel" does.

    Args:
      image: a normalised image.
      rng: the generator to draw from.
    """
    height, width, channels = image.shape
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREAS) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASED_RATIOS)))
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if down < height and across < width:
            top, left = rng.integers(height - down + 1), rng.integers(width - across + 1)
            erased = image.copy()  # the caller's array may be the data set's own
            noise = rng.standard_normal((down, across, channels), np.float32)
            erased[top : top + down, left : left + across] = noise
            return erased
    return image
