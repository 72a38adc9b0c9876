"""What is done to the pixels of one image, with the randomness given. geometry.py decides which part of it is seen.

Images are float32 in [0, 1], or Pillow's where an operation works on 8 bits.
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
TRIES = 10  # draws of a box to erase that may fail to fit into the image
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
