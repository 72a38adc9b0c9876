"""Which part of an image a model sees: a view, drawn once, then applied to the image, its boxes and its mask alike."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image as PillowImage

from castling_jax.data.decode import Box, Size, decode, image_size, open_image, read_crop
from castling_jax.data.pixels import Image
from castling_jax.preprocessing import Preprocessing

TRIES = 10  # draws of a crop, each of which may not fit into the image, before the fallback
CROP_RATIOS = (3 / 4, 4 / 3)  # width / height


@dataclasses.dataclass(frozen=True)
class View:
    """A box to cut out of an image, resize to the model's input, and mirror or not.

    Attributes:
      box: (top, left, height, width) in pixels of the upright image; fractions of pixels are allowed.
      size: (height, width) of the result.
      flip: whether the result is mirrored, left to right.
    """

    box: Box
    size: Size
    flip: bool = False

    def image(self, image: Any, preprocessing: Preprocessing, *, reduced: bool = False) -> Any:
        """The view's part of an image, antialiased: float32 [height, width, 3] for a float image, else a Pillow image.

        Args:
          image: an image that `decode` takes, or float32 [height, width, 3] in [0, 1].
          preprocessing: its interpolation and `exif` are used.
          reduced: whether a JPEG may be decoded at a smaller scale, as `read_crop` does.

        Raises:
          InputError: the image cannot be decoded.
        """
        # An image of the right size is taken as it is, because resizing could only round it.
        if self.box == (0, 0, *self.size) and size_of(image, preprocessing) == self.size:
            seen = image if is_float(image) else decode(image, exif=preprocessing.exif)
        elif is_float(image):
            seen = self._resized_floats(image, preprocessing.interpolation)
        else:
            interpolation = preprocessing.interpolation
            seen = read_crop(image, self.box, self.size, interpolation, exif=preprocessing.exif, reduced=reduced)
        if not self.flip:
            return seen
        return seen[:, ::-1] if isinstance(seen, np.ndarray) else seen.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)

    def boxes(self, boxes: Float[np.ndarray, "boxes 4"]) -> Float[np.ndarray, "boxes 4"]:
        """Boxes (x0, y0, x1, y1) in the image's pixels -> in the view's pixels; they are not cut off at its border."""
        top, left, height, width = self.box
        down, across = self.size[0] / height, self.size[1] / width
        moved = (boxes - np.array([left, top, left, top])) * np.array([across, down, across, down])
        if self.flip:
            moved[:, [0, 2]] = self.size[1] - moved[:, [2, 0]]  # mirroring swaps left and right edge
        return moved.astype(boxes.dtype)

    def mask(self, mask: Integer[np.ndarray, "height width"]) -> Integer[np.ndarray, "view_height view_width"]:
        """A mask of labels as the view shows it: each pixel gets the nearest label, never a mean of two."""
        resized = PillowImage.fromarray(mask).resize(self.size[::-1], PillowImage.Resampling.NEAREST, box=self._corners)
        labels = np.asarray(resized)
        return np.fliplr(labels) if self.flip else labels

    @property
    def _corners(self) -> tuple[float, float, float, float]:
        top, left, height, width = self.box
        return left, top, left + width, top + height

    def _resized_floats(self, image: Image, interpolation: str) -> Image:
        """Resizes one channel after another, because Pillow's float images have only one."""
        resampling = PillowImage.Resampling[interpolation.upper()]
        channels = [PillowImage.fromarray(channel) for channel in np.ascontiguousarray(image.transpose(2, 0, 1))]
        resized = [channel.resize(self.size[::-1], resampling, self._corners) for channel in channels]
        # Bicubic filters overshoot at edges; 8-bit images are clipped there too.
        return np.stack([np.asarray(channel) for channel in resized], -1).clip(0, 1)


def is_float(image: Any) -> bool:
    """Whether an image is an array of floats, which 8-bit operations do not support."""
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)


def opened(image: Any) -> Any:
    """The image with its header read, so that a transform which needs its size and its pixels reads the header once.

    Raises:
      InputError: the image cannot be decoded.
    """
    return image if is_float(image) else open_image(image)


def size_of(image: Any, preprocessing: Preprocessing) -> Size:
    """(height, width) of an image, upright if the preprocessing turns images by their EXIF orientation.

    Raises:
      InputError: the image cannot be decoded.
    """
    return image.shape[:2] if is_float(image) else image_size(image, exif=preprocessing.exif)


def evaluation_view(size: Size, preprocessing: Preprocessing) -> View:
    """Evaluation's view of an image: the whole image if it has the model's size, else its resized center."""
    if size == preprocessing.shape:
        return View((0, 0, *size), size)
    return View(center_crop_box(size, preprocessing), preprocessing.shape)


def random_resized_crop_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box of a random area and aspect ratio (Szegedy et al., arXiv 1409.4842), as torchvision and timm draw it.

    Args:
      size: (height, width) of the image.
      scale: smallest and largest area of the box, as shares of the image's area.
      rng: the generator to draw from.

    Returns:
      (top, left, height, width). If no draw fits, the largest box in the image's center whose aspect ratio is allowed.
    """
    height, width = size
    for _ in range(TRIES):
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIOS)))  # uniform in the logarithm: 3/4 is as likely as 4/3
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1)), down, across
    down = min(height, round(width / CROP_RATIOS[0]))
    across = min(width, round(height * CROP_RATIOS[1]))
    return (height - down) // 2, (width - across) // 2, down, across


def center_crop_box(size: Size, preprocessing: Preprocessing) -> Box:
    """The part of an image of this size that evaluation sees, resized and cut out as `Preprocessing` says.

    Sizes are rounded as in torchvision's Resize and CenterCrop, which timm's evaluation uses.
    """
    (height, width), result = size, preprocessing.shape
    down, across = (math.floor(side / preprocessing.crop_ratio) for side in result)
    if preprocessing.crop_mode == "center":
        # The axis that needs the larger scale decides; int() rounds the other side down, as torchvision does.
        if down / height >= across / width:
            across = int(down * width / height)
        else:
            down = int(across * height / width)
    top, left = round((down - result[0]) / 2), round((across - result[1]) / 2)
    # Back from pixels of the resized image to pixels of the original, so that one filter does crop and resize.
    return top * height / down, left * width / across, result[0] * height / down, result[1] * width / across
