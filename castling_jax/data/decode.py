"""Encoded images -> pixels, no more of them than are asked for.

An image is the bytes of a JPEG, PNG or any other file that Pillow reads, or an array of uint8 [height, width] or
[height, width, 1 or 3]. Its EXIF orientation is ignored, as TFDS and torchvision ignore it.
"""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from castling_jax.errors import InputError, in_one_sentence

Encoded = bytes | UInt8[np.ndarray, "height width *channels"]
Box = tuple[float, float, float, float]  # top, left, height, width
Size = tuple[int, int]  # height, width


def image_size(image: Encoded) -> Size:
    """(height, width) of an image, of which only the header is read.

    Raises:
      InputError: it cannot be decoded.
    """
    width, height = _open(image).size
    return height, width


def decode(image: Encoded) -> Image.Image:
    """The whole image, in RGB: transparency is dropped, and of 16 bits the upper 8 are kept.

    Raises:
      InputError: it cannot be decoded.
    """
    return _load(_open(image))


def read_crop(image: Encoded, box: Box, size: Size, interpolation: str = "bicubic") -> Image.Image:
    """Cuts `box` out of an image and resizes it, antialiased, to `size`; RGB.

    A JPEG is decoded at a half, a quarter or an eighth where the box stays at least as large as `size`. Crop and resize
    are one: a filter at the edge of the box sees the pixels behind it, which a crop on its own would cut off.

    Args:
      image: encoded, or an array.
      box: in pixels of the image; need not be whole.
      size: of the result.
      interpolation: of Pillow's, "bicubic" or "bilinear".

    Raises:
      InputError: it cannot be decoded.
    """
    top, left, height, width = box
    opened = _open(image)
    across, down = opened.size
    # libjpeg decodes at 1, 2, 4 or 8 times less; other formats know no draft.
    factor = 1 << min(int(min(height / size[0], width / size[1])), 8).bit_length() >> 1
    shrunk = 1.0
    if factor > 1:
        with _decoding():
            drafted = opened.draft(None, (across // factor, down // factor))
        if drafted is not None:
            shrunk = across / drafted[1][2]
    corners = (left / shrunk, top / shrunk, (left + width) / shrunk, (top + height) / shrunk)
    return _load(opened).resize(size[::-1], Image.Resampling[interpolation.upper()], box=corners)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Says in one sentence whatever goes wrong inside; Pillow's readers raise what they happen to stumble over."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError("an image cannot be decoded: it is of no format that Pillow knows.") from error
    except Exception as error:
        said = in_one_sentence(error) or type(error).__name__
        raise InputError(f"an image cannot be decoded: {said}.") from error


def _open(image: Encoded) -> Image.Image:
    """The image, with nothing but its header read yet."""
    if isinstance(image, bytes):
        with _decoding():
            return Image.open(io.BytesIO(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise InputError(
            "an image must be encoded bytes, or uint8 [height, width] or [height, width, 1 or 3], not "
            f"{image.dtype} {list(image.shape)}."
        )
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _load(opened: Image.Image) -> Image.Image:
    with _decoding():
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if opened.mode.startswith("I"):  # up to 65,535, which Pillow would clip at 255
            opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        opened.load()
        return opened if opened.mode == "RGB" else opened.convert("RGB")  # which would copy it
