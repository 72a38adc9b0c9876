"""The points that a detector predicts boxes at, and how its distances become boxes (PicoDet, Yu et al. 2021)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from castling_jax.errors import InputError
from castling_jax.ops.checks import check_shapes

STRIDES = (8, 16, 32, 64)  # the strides of PicoDet's levels, in pixels
SIDES, BINS = 4, 8  # a box's sides, each with a distribution over distances of 0 to 7 strides


def level_points(
    image_size: int | tuple[int, int],
) -> tuple[Float[np.ndarray, "points 2"], Float[np.ndarray, " points"], tuple[int, ...]]:
    """The centres of the cells of every level: level by level, and row by row within a level.

    A level has ceil(height / stride) rows and ceil(width / stride) columns, as a convolution of stride 2 with padding
    gives them, so points of the last row or column may lie past the image. 416 x 416 pixels have 3,598 points.

    Args:
      image_size: side, or (height, width), in pixels.

    Returns:
      Points (x, y) = (column + 0.5, row + 0.5) * stride in pixels, the stride of each point, and the number of points
      of each level. The arrays are NumPy's, float32, so a program that uses them has them as constants.

    Raises:
      InputError: `image_size` is not one positive integer or two.
    """
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(f"image_size must be a positive integer or (height, width), not {image_size!r}.")
    points, counts = [], []
    for stride in STRIDES:
        rows, columns = (-(-side // stride) for side in sides)
        y, x = np.divmod(np.arange(rows * columns), columns)
        points.append((np.stack([x, y], axis=1) + 0.5) * stride)
        counts.append(rows * columns)
    return np.concatenate(points).astype(np.float32), np.repeat(np.array(STRIDES, np.float32), counts), tuple(counts)


def decode_boxes(
    reg_logits: Float[Array | np.ndarray, "... points sides_bins"],
    points: Float[Array | np.ndarray, "points 2"],
    strides: Float[Array | np.ndarray, " points"],
) -> Float[Array, "... points 4"]:
    """Boxes from the distributions of their distances (Li et al., Generalized Focal Loss, equation 4).

    A point's distance to a side is stride * sum_i i * softmax(logits of the side)_i.

    Args:
      reg_logits: bins 0, 1, ... of the left side, then of the top, right and bottom side; PicoDet has 4 x 8.
      points: (x, y) in pixels.
      strides: the stride of each point's level, in pixels.

    Returns:
      (x0, y0, x1, y1) in pixels, in float32 at least; x0 <= x <= x1 and y0 <= y <= y1.

    Raises:
      InputError: the last axis of `reg_logits` is not four times a number of bins, or another shape does not fit.
    """
    *axes, count, channels = reg_logits.shape
    bins = channels // 4
    check_shapes(reg_logits=(reg_logits, (*axes, count, 4 * bins)))
    check_shapes(points=(points, (count, 2)), strides=(strides, (count,)))
    wide = jnp.asarray(reg_logits, jnp.promote_types(reg_logits.dtype, jnp.float32))
    shares = jax.nn.softmax(wide.reshape(*axes, count, 4, bins))
    distances = (shares * jnp.arange(bins)).sum(-1) * jnp.asarray(strides)[:, None]
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)
