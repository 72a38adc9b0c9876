"""Pixels become a model's input: (pixel - mean) / std, on the host or on the device."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing

FLOATS = "fV"  # NumPy's kinds of floating dtypes; V is bfloat16


def normalize_images(images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing) -> Any:
    """Turns pixels into a model's input: (images - mean) / std, channel by channel.

    Training, evaluation, `preprocess` and exported programs all use this function: on the device for uint8 pixels, on
    the host for floats. With the statistics of a data set as mean and std, its pixels get mean 0 and standard
    deviation 1.

    Args:
      images: NumPy or JAX array [..., height, width, 3]: uint8, which is divided by 255 first, or floats in [0, 1].
      preprocessing: gives mean and std, for pixels in [0, 1]. Its other fields are not used: nothing is resized.

    Returns:
      Floats of the same shape: float64 for float64 images, else float32.

    Raises:
      InputError: the images are no array, have another dtype, or not three channels.
    """
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) < 3 or shape[-1] != 3:
        what = type(images).__name__ if shape is None else f"of shape {shape}"
        raise InputError(f"images must be an array [..., height, width, 3], not {what}.")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    elif np.dtype(images.dtype).kind not in FLOATS:
        raise InputError(f"images must be uint8, or floats in [0, 1], not {images.dtype}.")
    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    if not isinstance(images, np.ndarray):
        return (images - mean) / std
    # Row by row: NumPy is slow when the last axis has only three entries.
    rows = images.reshape(*shape[:-2], 3 * shape[-2])
    means, stds = (np.tile(values, shape[-2]) for values in (mean, std))
    return ((rows - means) / stds).reshape(shape)


def model_input(images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing) -> Any:
    """A model's input from the images of examples: uint8 pixels are normalised; floats are normalised already.

    Raises:
      InputError: the images have another dtype.
    """
    return images if np.dtype(images.dtype).kind in FLOATS else normalize_images(images, preprocessing)


def denormalize_images(
    images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "*batch height width 3"]:
    """Inverts `normalize_images`, for pictures; values outside [0, 1] are clipped."""
    return np.clip(np.asarray(images) * np.asarray(preprocessing.std) + np.asarray(preprocessing.mean), 0, 1)


def to_pixels(
    images: Num[Array | np.ndarray, "*batch height width 3"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """A model's input as pixels again, rounded to 8 bits."""
    return np.round(255 * denormalize_images(images, preprocessing)).astype(np.uint8)
