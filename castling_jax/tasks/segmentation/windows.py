"""Windows: the parts of an image that a segmenter sees one by one, and their logits joined at the image's own size."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from castling_jax.data.decode import Box, Size
from castling_jax.errors import InputError
from castling_jax.preprocessing import Preprocessing

MOST_WINDOWS = 64
STEP = 2 / 3  # largest distance between two windows, as a share of a window; MMSegmentation's ADE20K has 341 / 512


def windows_of(size: Size, preprocessing: Preprocessing) -> list[Box]:
    """The parts of an image that the model sees: (top, left, height, width) of each, in whole pixels of the image.

    With crop_mode "squash" it is the whole image. With "slide" the image keeps its aspect ratio, to a pixel, and a
    window is as large as fits into it: the windows lie along the longer side, evenly from end to end.

    Raises:
      InputError: there would be more than MOST_WINDOWS. An evaluation computes as many for every image of a split.
    """
    if preprocessing.crop_mode == "squash":
        return [(0, 0, *size)]
    # Pixels of the image for one pixel of a window.
    scale = min(side / seen for side, seen in zip(size, preprocessing.shape, strict=True))
    # Whole pixels: at a fraction, rounding would decide whether a window shows the pixel whose centre is its edge.
    height, width = (max(round(scale * seen), 1) for seen in preprocessing.shape)
    corners = list(itertools.product(_starts(size[0], height), _starts(size[1], width)))
    if len(corners) > MOST_WINDOWS:
        raise InputError(
            f"an image of {size[1]} x {size[0]} pixels has {len(corners)} windows, and may have {MOST_WINDOWS}: "
            "cut it into parts, or set config.dataset.crop_mode = 'squash'."
        )
    return [(top, left, height, width) for top, left in corners]


def join(
    logits: Float[Array, "batch windows height width classes"],
    windows: Float[Array, "batch windows 4"],
    room: tuple[int, ...],
) -> Float[Array, "batch rows columns classes"]:
    """Each image's logits at its own size, at the top left of arrays of one shape: the mean of the windows there.

    Each window's logits are resized bilinearly to the part of the image that the window shows.

    Args:
      logits: the windows' logits.
      windows: the windows, as `windows_of` returns them; one that lies beyond `room` does not count.
      room: (rows, columns) of the result; beyond an image its values mean nothing.
    """

    def resized(x: Array, window: Array) -> Array:
        scale = window[2:] / jnp.array(x.shape[:2], jnp.float32)
        return jax.image.scale_and_translate(
            x, (*room, x.shape[-1]), (0, 1), scale, window[:2], "linear", antialias=False
        )

    def one(logits: Array, windows: Array) -> Array:
        if len(windows) == 1:
            return resized(logits[0], windows[0])
        # Ones are resized along with the logits: they count the windows that show a pixel.
        counted = jnp.concatenate([logits, jnp.ones((*logits.shape[:-1], 1))], axis=-1)
        zeros = jnp.zeros((*room, counted.shape[-1]))
        total, _ = jax.lax.scan(lambda total, window: (total + resized(*window), None), zeros, (counted, windows))
        return total[..., :-1] / jnp.maximum(total[..., -1:], 1)

    return jax.vmap(one)(logits, windows)


def join_on_host(
    logits: Float[np.ndarray, "windows height width classes"], windows: Float[np.ndarray, "windows 4"], size: Size
) -> Float[np.ndarray, "rows columns classes"]:
    """`join` for one image on the host: sizes differ from image to image, and JAX would compile a program for each."""
    total, count = np.zeros((*size, logits.shape[-1]), np.float32), np.zeros((*size, 1), np.float32)
    for seen, window in zip(logits, windows.astype(int), strict=True):
        shown = []
        for axis, (start, length) in enumerate(zip(window[:2], window[2:], strict=True)):
            # Half-pixel centres: pixel i of the window's part of the image is at i + 0.5.
            seen = _interpolated(seen, (np.arange(length) + 0.5) * seen.shape[axis] / length - 0.5, axis)
            shown.append(slice(start, start + length))
        total[tuple(shown)] += seen
        count[tuple(shown)] += 1
    return total / count


def _starts(side: int, length: int) -> list[int]:
    """Where windows of a length start that lie evenly along a side, at most STEP of a window apart, to a pixel."""
    count = 1 + math.ceil((side - length) / (STEP * length) - 1e-6)  # less than rounding could add
    return sorted({round(start) for start in np.linspace(0, side - length, count)})


def _interpolated(
    x: Float[np.ndarray, "rows columns classes"], place: Float[np.ndarray, "places"], axis: int
) -> np.ndarray:
    """Linear interpolation along an axis; places beyond the ends count as the ends."""
    place = np.clip(place, 0, x.shape[axis] - 1)
    low = np.floor(place).astype(int)
    share = (place - low).astype(np.float32).reshape(-1, *(1,) * (2 - axis))
    below, above = (np.take(x, index, axis) for index in (low, np.minimum(low + 1, x.shape[axis] - 1)))
    return below + share * (above - below)
