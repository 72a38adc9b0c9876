"""Anchor-free boxes: each point of a grid predicts its distances to the four sides, as distributions over bins."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BINS = 8  # distances from 0 to 7 strides
SIDES = 4


def level_sizes(image: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, columns) of each level's points in an image of (height, width) pixels; sides are rounded up."""
    return [(math.ceil(image[0] / stride), math.ceil(image[1] / stride)) for stride in strides]


def grid_points(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int]
) -> tuple[Float[np.ndarray, "points 2"], Float[np.ndarray, "points"]]:
    """(x, y) in pixels and stride of each point, level by level, row by row; a point is the center of its cell.

    At stride 64 the last row and column may lie past the image's border.
    """
    points, steps = [], []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        # meshgrid's default order gives [rows, columns], the order in which a map's positions are flattened.
        x, y = np.meshgrid(np.arange(columns), np.arange(rows))
        points.append((np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride)
        steps.append(np.full(rows * columns, stride))
    return np.concatenate(points).astype(np.float32), np.concatenate(steps).astype(np.float32)


def decode_boxes(
    reg_logits: Float[Array, "batch points 32"],
    points: Float[np.ndarray, "points 2"],
    strides: Float[np.ndarray, "points"],
) -> Float[Array, "batch points 4"]:
    """Boxes (x0, y0, x1, y1) in pixels: a side's distance from its point is the mean of its bins, times the stride."""
    # Bins are the last axis, sides the one before, as in PaddleDetection, so that its weights fit unchanged.
    bins = jax.nn.softmax(reg_logits.reshape(*reg_logits.shape[:2], SIDES, BINS), axis=-1)
    distances = jnp.sum(bins * jnp.arange(BINS, dtype=bins.dtype), axis=-1) * strides[:, None]
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)
