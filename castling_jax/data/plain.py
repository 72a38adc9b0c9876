"""The least that is done to an image: decoded, in three channels, normalised; and shifted for training."""

import io
from typing import Any

import numpy as np
from PIL import Image

from castling_jax.data.transforms import normalize, training_example
from castling_jax.ops.errors import InputError


def train_example(example: dict[str, Any], rng: np.random.Generator, *, shift_pixels: int) -> dict[str, Any]:
    """Shifted at random."""
    return training_example(_decoded(example), rng, shift_pixels=shift_pixels)


def eval_example(example: dict[str, Any]) -> dict[str, Any]:
    """As it is."""
    example = _decoded(example)
    return example | {"image": normalize(example["image"])}


def _decoded(example: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(example["image"], bytes):
        return example
    try:
        image = np.asarray(Image.open(io.BytesIO(example["image"])).convert("RGB"))
    except Exception as error:  # of many kinds
        raise InputError(f"an image cannot be decoded ({error}).") from error
    return example | {"image": image.astype(np.float32) / 255}
