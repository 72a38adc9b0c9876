"""Encoded images -> pixels, decoding no more than the crop needs.

An image is the bytes of a JPEG, PNG or any other file that Pillow reads, a Pillow image, or an array of uint8
[height, width] or [height, width, 1 or 3].

The EXIF orientation is ignored unless `exif` is set; TFDS and torchvision ignore it too. A TIFF's orientation always
counts, because Pillow applies it.

16-bit grey pixels keep their upper 8 bits. Other pixels of more than 8 bits are refused, because the file does not
state their range: 12 bits, 32-bit integers and floating-point numbers.
"""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from castling_jax.errors import InputError, in_one_sentence

Encoded = bytes | Image.Image | UInt8[np.ndarray, "height width *channels"]
Box = tuple[float, float, float, float]  # top, left, height, width
Size = tuple[int, int]  # height, width
# EXIF orientation -> the operation that turns the image upright (Exif 2.3, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # orientations that swap width and height
BITS_PER_SAMPLE = 258  # number of a TIFF tag
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit pixels Pillow opens in mode I; in other formats I means 32 bits


def image_size(image: Encoded, *, exif: bool = False) -> Size:
    """Reads (height, width) from an image's header; with `exif`, the size of the upright image.

    Raises:
      InputError: the image cannot be decoded.
    """
    opened = open_image(image)
    width, height = opened.size
    return (width, height) if exif and _orientation(opened) in SWAPPED else (height, width)


def decode(image: Encoded, *, exif: bool = False) -> Image.Image:
    """The whole image, in RGB: transparency is dropped, and 16-bit pixels keep their upper 8 bits.

    Args:
      image: an encoded image, an array, or a Pillow image.
      exif: whether the image is turned as its EXIF orientation says.

    Raises:
      InputError: the image cannot be decoded, or the range of its pixels is unknown.
    """
    return _load(open_image(image), exif)


def read_crop(
    image: Encoded, box: Box, size: Size, interpolation: str = "bicubic", *, exif: bool = False, reduced: bool = True
) -> Image.Image:
    """Cuts `box` out of an image and resizes it, antialiased, to `size`; RGB.

    Crop and resize are one operation, so that the filter at the edge of the box sees the pixels outside it; a separate
    crop would cut them off.

    Args:
      image: an encoded image, an array, or a Pillow image.
      box: the part to cut out, in pixels of the image (upright if `exif` is set); fractions of pixels are allowed.
      size: height and width of the result.
      interpolation: Pillow's "bicubic" or "bilinear".
      exif: whether the image is turned as its EXIF orientation says.
      reduced: whether a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as the box stays at least as large
        as `size`. That is faster, and changes pixels of large photographs by up to about 30 of 255 levels.

    Raises:
      InputError: the image cannot be decoded, or the range of its pixels is unknown.
    """
    top, left, height, width = box
    opened = open_image(image)
    across, down = opened.size
    # The largest power of two, at most 8, by which the box can shrink without getting smaller than `size`: libjpeg
    # decodes at these scales, and other formats do not support drafts.
    factor = 1 << min(int(min(height / size[0], width / size[1])), 8).bit_length() >> 1
    shrunk = 1.0
    if reduced and factor > 1:
        with decoding():
            drafted = opened.draft(None, (across // factor, down // factor))
        if drafted is not None:  # Pillow chose the scale; its box has the exact size, before rounding to pixels
            shrunk = across / drafted[1][2]
    corners = (left / shrunk, top / shrunk, (left + width) / shrunk, (top + height) / shrunk)
    return _load(opened, exif).resize(size[::-1], Image.Resampling[interpolation.upper()], box=corners)


@contextlib.contextmanager
def decoding(what: str = "an image") -> Iterator[None]:
    """Turns any exception inside the block into an InputError about `what`; Pillow's readers raise all kinds."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f"{what} cannot be decoded: it has no format that Pillow knows.") from error
    except Exception as error:
        detail = in_one_sentence(error) or type(error).__name__
        raise InputError(f"{what} cannot be decoded: {detail}.") from error


def open_image(image: Encoded) -> Image.Image:
    """Opens an image; only its header is read.

    Raises:
      InputError: the image cannot be decoded.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        with decoding():
            return Image.open(io.BytesIO(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise InputError(
            "an image must be encoded bytes, or uint8 [height, width] or [height, width, 1 or 3], not "
            f"{image.dtype} {list(image.shape)}."
        )
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _orientation(opened: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if there is none or it cannot be read."""
    # Pillow turns a TIFF itself. For a PNG without EXIF in its header, getexif would decode all pixels to look for it.
    if opened.format == "TIFF" or (opened.format == "PNG" and "exif" not in opened.info):
        return 1
    with contextlib.suppress(Exception):  # a damaged EXIF block raises many kinds, and the pixels may be fine
        return int(opened.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _load(opened: Image.Image, exif: bool) -> Image.Image:
    with decoding():
        # Before any conversion, which drops EXIF.
        turn = TURNS.get(_orientation(opened)) if exif else None
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if opened.mode == "I" and opened.format not in SIXTEEN_BITS:
            raise ValueError("its pixels are integers of 32 bits, whose range is not known")
        if opened.format == "TIFF" and getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):
            raise ValueError("its pixels have 12 bits, but only 8 or 16 are supported")
        opened.load()
        if opened.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        if opened.mode != "RGB":
            opened = opened.convert("RGB")
        return opened if turn is None else opened.transpose(turn)
