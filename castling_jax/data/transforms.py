"""What is done to one example: numpy in, numpy out, with the randomness given."""

from typing import Any

import numpy as np
from jaxtyping import Float

Image = Float[np.ndarray, "height width channels"]


def random_shift(image: Image, rng: np.random.Generator, pixels: int) -> Image:
    """Moves the image by up to `pixels` along each axis; what comes in from outside is zero."""
    height, width, _ = image.shape
    row, column = rng.integers(0, 2 * pixels + 1, size=2)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    return padded[row : row + height, column : column + width]


def normalize(image: Image) -> Image:
    """From [0, 1] to [-1, 1]."""
    return 2 * image - 1


def training_example(example: dict[str, Any], rng: np.random.Generator, *, shift_pixels: int) -> dict[str, Any]:
    """The augmentations of training, in their order."""
    image = random_shift(example["image"], rng, shift_pixels) if shift_pixels else example["image"]
    return example | {"image": normalize(image)}
