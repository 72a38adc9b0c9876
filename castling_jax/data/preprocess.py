"""Turns images of any kind into a model's input, exactly as evaluation does."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image as PillowImage

from castling_jax.data.transforms import EvalTransform
from castling_jax.errors import InputError, about, refusing
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing


def preprocess(images: Any, preprocessing: Preprocessing) -> Float[np.ndarray, "batch image_size image_size 3"]:
    """Turns images into the input of `apply` and of exported programs, as evaluation does.

    The pixels are evaluation's bit by bit. Evaluation normalises them on the device, where rounding may differ.

    Args:
      images: one image or a list of them. An image is a path, gs:// too; the bytes of a JPEG, PNG or any other file
        that Pillow reads; a Pillow image; or an array [height, width] or [height, width, 1 or 3]. An array [batch,
        height, width, 3] holds several images. Arrays are uint8, or floats in [0, 1].
      preprocessing: the model's preprocessing, from `castling_jax.convert.read(PATH).preprocessing`.

    Returns:
      float32 pixels, in the order of the images.

    Raises:
      InputError: there is no image, an image cannot be read or decoded or is of another kind, the crop_mode is "slide",
        or `preprocessing` is None because the weights do not state it.
    """
    if not isinstance(preprocessing, Preprocessing):
        raise InputError(
            f"preprocess needs a Preprocessing, not {type(preprocessing).__name__}: castling_jax.convert.read(PATH)"
            ".preprocessing is one, where the weights state it."
        )
    if preprocessing.crop_mode == "slide":
        raise InputError("preprocess cannot have a model see windows of an image (crop_mode 'slide'): predict does.")
    transform = EvalTransform(preprocessing)
    prepared = []
    for name, image in named_images(images):
        with about(name):
            seen = transform({"image": read_image(image)})["image"]
            prepared.append(model_input(seen, preprocessing))
    if not prepared:
        raise InputError("preprocess needs at least one image, and there is none.")
    return np.stack(prepared)


def named_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Yields the images one by one, each with a name for error messages."""
    if hasattr(images, "ndim"):  # an array, of one image or of several
        images = np.asarray(images) if images.ndim == 4 else [images]
    elif isinstance(images, str | os.PathLike | bytes | PillowImage.Image):
        images = [images]
    try:
        numbered = enumerate(images)
    except TypeError:
        raise InputError(f"images must be an image or a list of them, not {type(images).__name__}.") from None
    for number, image in numbered:
        yield f"'{image}'" if isinstance(image, str | os.PathLike) else f"image {number}", image


def read_image(image: Any) -> Any:
    """Brings an image to a form that data sets have: encoded, a Pillow image, uint8, or float32 [height, width, 3]."""
    if isinstance(image, str | os.PathLike):
        with refusing((OSError, ValueError), "the file cannot be read"):
            path = epath.Path(image) if "://" in os.fspath(image) else Path(image).expanduser()
            return path.read_bytes()
    if isinstance(image, bytes | PillowImage.Image):
        return image
    if not hasattr(image, "ndim"):
        raise InputError(f"an image must be a path, bytes, a Pillow image or an array, not {type(image).__name__}.")
    array = np.asarray(image)
    if not jnp.issubdtype(array.dtype, jnp.floating):  # JAX's issubdtype, because NumPy's does not know bfloat16
        return array  # `decode` refuses all but uint8
    array = array.astype(np.float32)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise InputError(
            f"an image must be [height, width] or [height, width, 1 or 3], not {list(array.shape)}; several grey ones "
            "are a list."
        )
    if not (array.min() >= 0 and array.max() <= 1):  # this way around NaN is refused as well
        raise InputError(f"floats must be in [0, 1], not from {array.min():g} to {array.max():g}.")
    return np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3))
