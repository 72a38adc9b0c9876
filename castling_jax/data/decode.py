"""Encoded images -> pixels, no more of them than are asked for.

An image is the bytes of a JPEG, PNG or any other file that Pillow reads, an image of Pillow's, or an array of uint8
[height, width] or [height, width, 1 or 3].

Its EXIF orientation is ignored, as TFDS and torchvision ignore it, unless `exif` is set. A TIFF's orientation always
counts, because Pillow applies it.

Of 16-bit grey pixels the upper 8 bits are kept. Other pixels of more than 8 bits are refused: 12 bits, 32-bit integers
and floating-point numbers have no range that the file states.
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
# EXIF orientation -> what turns the image upright (Exif 2.3, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # orientations whose upright image has the height for its width
BITS_PER_SAMPLE = 258  # TIFF's tag
SIXTEEN_BITS = ("PNG", "PPM")  # formats of whose 16 bits Pillow makes its mode I, which is of 32 bits elsewhere


def image_size(image: Encoded, *, exif: bool = False) -> Size:
    """(height, width) of an image, of which only the header is read; with `exif` those of the upright image.

    Raises:
      InputError: it cannot be decoded.
    """
    opened = _open(image)
    width, height = opened.size
    return (width, height) if exif and _orientation(opened) in SWAPPED else (height, width)


def decode(image: Encoded, *, exif: bool = False) -> Image.Image:
    """The whole image, in RGB: transparency is dropped, and of 16 bits the upper 8 are kept.

    Args:
      image: encoded, an array, or Pillow's.
      exif: whether it is turned as its EXIF orientation says.

    Raises:
      InputError: it cannot be decoded, or has pixels of a depth that has no range.
    """
    return _load(_open(image), exif)


def read_crop(
    image: Encoded, box: Box, size: Size, interpolation: str = "bicubic", *, exif: bool = False, reduced: bool = True
) -> Image.Image:
    """Cuts `box` out of an image and resizes it, antialiased, to `size`; RGB.

    Crop and resize are one: a filter at the edge of the box sees the pixels behind it, which a crop on its own would
    cut off.

    Args:
      image: encoded, an array, or Pillow's.
      box: in pixels of the image, upright if `exif` is set; need not be whole.
      size: of the result.
      interpolation: of Pillow's, "bicubic" or "bilinear".
      exif: whether the image is turned as its EXIF orientation says.
      reduced: whether a JPEG may be decoded at a half, a quarter or an eighth, where the box stays at least as large as
        `size`. That is faster, and moves pixels of large photographs by up to some 30 levels of 255.

    Raises:
      InputError: it cannot be decoded, or has pixels of a depth that has no range.
    """
    top, left, height, width = box
    opened = _open(image)
    across, down = opened.size
    # libjpeg decodes at 1, 2, 4 or 8 times less; other formats know no draft.
    factor = 1 << min(int(min(height / size[0], width / size[1])), 8).bit_length() >> 1
    shrunk = 1.0
    if reduced and factor > 1:
        with _decoding():
            drafted = opened.draft(None, (across // factor, down // factor))
        if drafted is not None:
            shrunk = across / drafted[1][2]
    corners = (left / shrunk, top / shrunk, (left + width) / shrunk, (top + height) / shrunk)
    return _load(opened, exif).resize(size[::-1], Image.Resampling[interpolation.upper()], box=corners)


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
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        with _decoding():
            return Image.open(io.BytesIO(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise InputError(
            "an image must be encoded bytes, or uint8 [height, width] or [height, width, 1 or 3], not "
            f"{image.dtype} {list(image.shape)}."
        )
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _orientation(opened: Image.Image) -> int:
    """Of EXIF; 1, upright, where there is none or it cannot be read."""
    if opened.format == "TIFF" or (opened.format == "PNG" and "exif" not in opened.info):  # which would be loaded
        return 1
    with contextlib.suppress(Exception):  # of many kinds; the pixels are not in it
        return int(opened.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _load(opened: Image.Image, exif: bool) -> Image.Image:
    with _decoding():
        turn = TURNS.get(_orientation(opened)) if exif else None
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if opened.mode == "I" and opened.format not in SIXTEEN_BITS:
            raise ValueError("its pixels are integers of 32 bits, whose range is not known")
        if opened.format == "TIFF" and getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):
            raise ValueError("its pixels are of 12 bits, and those of 8 or 16 are known")
        opened.load()
        if opened.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        if opened.mode != "RGB":
            opened = opened.convert("RGB")
        return opened if turn is None else opened.transpose(turn)
