"""The images of a batch, on the device: what the host leaves to do before a model sees them.

The host sends a batch's "image" as uint8 pixels, a quarter of the bytes of float32. What is exact only after the
normalisation is sent as a few integers: "filled", the part of each result that the image fills, and "erased", a box.
Images that are floats already, such as those of digits, have been normalised on the host.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from castling_jax.errors import InputError
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.task import Batch

Images = Float[Array, "batch height width 3"]


def finish_images(batch: Batch, preprocessing: Preprocessing | None, key: Key[Array, ""] | None = None) -> Batch:
    """The batch with the images that a model takes, and without the integers that this function has used.

    Args:
      batch: examples, stacked. "image" is uint8 or floats that are normalised already. If there is "filled" [batch, 2],
        the image is zero, the mean colour, beyond these first rows and columns. If there is "erased" [batch, 4], the
        image has noise in these boxes.
      preprocessing: the normalisation of uint8 images; None if all images are floats.
      key: draws the noise; only needed with "erased".

    Raises:
      InputError: the images are uint8 and there is no preprocessing.
    """
    rest = dict(batch)
    images, filled, erased = rest.pop("image"), rest.pop("filled", None), rest.pop("erased", None)
    if preprocessing is not None:
        images = model_input(images, preprocessing)
    elif images.dtype == jnp.uint8:
        raise InputError(
            "the images are uint8, and nothing says how to normalise them: give make_train_step and make_evaluator a "
            "preprocessing, or batches of normalised floats."
        )
    if filled is not None:
        images = jnp.where(_inside(images, jnp.pad(filled, ((0, 0), (2, 0)))), images, 0)
    if erased is not None:
        assert key is not None
        images = erase(images, erased, key)
    return {"image": images, **rest}


def erase(images: Images, boxes: Int[Array, "batch 4"], key: Key[Array, ""]) -> Images:
    """Fills a box (top, left, height, width) of each image with normal noise; a box of zeros leaves its image alone.

    The noise of a pixel depends on the key and on the pixel's place in the global batch alone, so it is the same on
    every mesh.
    """
    # Noise for all pixels: XLA draws and selects in one pass, and boxes of many shapes could not be one program.
    return jnp.where(_inside(images, boxes), _noise(key, images.shape).astype(images.dtype), images)


def _noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Standard normal numbers for RGB pixels, with 21 random bits each.

    Almost all time goes into the generator. Threefry's one call for a key gives the 64 bits that a pixel needs, where
    `jax.random.normal` makes three calls (docs/kernels.md).
    """
    words = jax.random.key_data(jax.random.split(key, shape[:3]))
    return _normal(_channel_bits(words[..., 0], words[..., 1]))


def _channel_bits(first: UInt32[Array, "*pixels"], second: UInt32[Array, "*pixels"]) -> UInt32[Array, "*pixels 3"]:
    """Three numbers of 21 bits, no two of which share a bit of these words."""
    left_over = (first & 0x7FF) << 10 | second & 0x3FF
    return jnp.stack([first >> 11, second >> 11, left_over], axis=-1)


def _normal(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The standard normal number of each number of 21 bits."""
    # The middles of 2^21 equal parts of (-1, 1): exact in float32, and never at an end, which would be infinite.
    return math.sqrt(2) * jax.lax.erf_inv((bits.astype(jnp.int32).astype(jnp.float32) + 0.5) / 2**20 - 1)


def _inside(images: Images, boxes: Int[Array, "batch 4"]) -> Bool[Array, "batch height width 1"]:
    """Whether each pixel is in its image's box (top, left, height, width)."""
    top, left, height, width = (boxes[:, index, None] for index in range(4))
    rows, columns = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return in_rows[:, :, None, None] & in_columns[:, None, :, None]
