"""Operations on the pixels of one image; the caller passes the random generator. geometry.py chooses the visible part.

Images are uint8, or float32 in [0, 1] from data sets with other pixels than 8 bits. Operations of Pillow's take Pillow
images.
"""

import math

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image as PillowImage
from PIL import ImageEnhance

from castling_jax.normalization import normalize_images
from castling_jax.preprocessing import Preprocessing

Image = Float[np.ndarray, "height width 3"] | UInt8[np.ndarray, "height width 3"]
ErasedBox = Int32[np.ndarray, "4"]
TRIES = 10  # draws of a box to erase; if no box fits into the image, nothing is erased
ERASED_AREAS = (0.02, 1 / 3)  # the box's area / the image's area
ERASED_RATIOS = (0.3, 1 / 0.3)  # height / width
# SSD's changes of colour: the smallest and the largest factor, and the largest turn of the hue.
DISTORTION, HUE_DEGREES = (0.5, 1.5), 18.0
# NTSC's brightness (Y) and two axes of colour (I, Q), each as weights of red, green and blue. Pillow's grey is Y.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def random_shift(image: Image, rng: np.random.Generator, pixels: int) -> Image:
    """Moves the image by up to `pixels` along each axis; pixels from outside the image are black."""
    height, width, _ = image.shape
    row, column = rng.integers(0, 2 * pixels + 1, size=2)
    padded = np.zeros((height + 2 * pixels, width + 2 * pixels, 3), image.dtype)  # np.pad takes several times as long
    padded[pixels : pixels + height, pixels : pixels + width] = image
    return padded[row : row + height, column : column + width]


def example_image(seen: PillowImage.Image | Image, preprocessing: Preprocessing) -> Image:
    """The image of an example, from what a view shows: uint8 pixels as they are, and floats in [0, 1] normalised.

    A float32 image is four times as large: the host sends bytes, and the device turns them into the model's input with
    `model_input`.
    """
    pixels = np.asarray(seen)
    return pixels if pixels.dtype == np.uint8 else normalize_images(pixels, preprocessing)


def color_jitter(image: PillowImage.Image, rng: np.random.Generator, strength: float) -> PillowImage.Image:
    """Changes brightness, contrast and saturation by up to 1 +- strength, in random order, as torchvision does."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for index in rng.permutation(3):
        image = enhancers[index](image).enhance(factors[index])
    return image


def random_distortion(image: Image, rng: np.random.Generator, probability: float) -> Image:
    """Changes brightness, contrast, saturation and hue in a random order, each with this probability.

    These are SSD's changes (Liu et al., arXiv 1512.02325, section 2.2). The first three are those of Pillow's
    `ImageEnhance`; the hue turns in the plane of I and Q, which keeps the brightness. Each change is an affine map of a
    pixel's channels, so all of them together are one matrix and one offset. At the end values are clipped, and 8 bits
    are rounded.
    """
    brightest = 255 if image.dtype == np.uint8 else 1
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
    mean = image.mean(0).mean(0, dtype=np.float64) / brightest
    change, offset = np.eye(3), np.zeros(3)
    for chosen in rng.permutation(4):
        if is_on[chosen]:
            change, offset = matrices[chosen] @ change, matrices[chosen] @ offset
            # Contrast moves pixels towards the image's mean grey before this change, which is the mean grey after it
            # divided by `contrast`.
            if chosen == 1:
                offset = offset + (1 - contrast) / contrast * (grey @ (change @ mean + offset))
    # Channel by channel, not as a matrix product: BLAS would start threads of its own in each of the loader's threads.
    changed = np.empty(image.shape, np.float32)
    channels = [image[..., channel].astype(np.float32) for channel in range(3)]
    shifts = (brightest * offset).astype(np.float32)
    for channel, (weights, shift) in enumerate(zip(change.astype(np.float32), shifts, strict=True)):
        changed[..., channel] = sum(weight * values for weight, values in zip(weights, channels, strict=True)) + shift
    changed.clip(0, brightest, out=changed)
    return np.rint(changed).astype(np.uint8) if image.dtype == np.uint8 else changed


def random_erased_box(size: tuple[int, int], rng: np.random.Generator) -> ErasedBox:
    """A box to fill with normal noise (Zhong et al., arXiv 1708.04896), as timm's mode "pixel" draws it.

    The device fills it, after the normalisation, with noise that is distributed like the pixels (`erase` of
    tasks/images.py).

    Args:
      size: (height, width) of the image.
      rng: the generator to draw from.

    Returns:
      (top, left, height, width); zeros if no box fits into the image.
    """
    height, width = size
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREAS) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASED_RATIOS)))
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if down < height and across < width:
            top, left = rng.integers(height - down + 1), rng.integers(width - across + 1)
            return np.array((top, left, down, across), np.int32)
    return np.zeros(4, np.int32)
