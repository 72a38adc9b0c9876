"""Axis-aligned boxes, (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, and how far they overlap."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from castling_jax.errors import check
from castling_jax.ops.checks import check_array
from castling_jax.ops.mesh import on_auto_axes, split_as

# The smallest denominator of a ratio of areas. A derivative divides by its square, 1e-36, which float32 can still hold.
SMALLEST_AREA = 1e-18


def _pairs_split_as(a: Array | np.ndarray) -> PartitionSpec:
    """How the result, [..., n, m], is split over the mesh: as `a`, [..., n, 4], and not along m."""
    return split_as(a, *range(a.ndim - 1), None)


@on_auto_axes(_pairs_split_as)
def box_iou(
    a: Float[Array | np.ndarray, "... n 4"], b: Float[Array | np.ndarray, "... m 4"]
) -> Float[Array, "... n m"]:
    """Intersection over union of each box in `a` with each box in `b`, from 0 to 1, in float32 at least.

    Args:
      a: boxes (x0, y0, x1, y1) in any unit.
      b: boxes in the same unit; leading axes broadcast against those of `a`.

    Returns:
      The ratios. A box without area, or with x1 < x0 or y1 < y0, has an IoU of 0 with every box, itself included. Areas
      under 1e-18 count as 1e-18 in the denominator, so the gradient is finite everywhere.

    Raises:
      InputError: `a` or `b` is not a floating array of boxes.
    """
    _check_boxes("a", a)
    _check_boxes("b", b)
    return iou(corners(a[..., :, None, :]), corners(b[..., None, :, :]))


@on_auto_axes(_pairs_split_as)
def generalized_box_iou(
    a: Float[Array | np.ndarray, "... n 4"], b: Float[Array | np.ndarray, "... m 4"]
) -> Float[Array, "... n m"]:
    """IoU - (C - union) / C with the enclosing box's area C, from -1 to 1 (Rezatofighi et al., GIoU, algorithm 1).

    Arguments, dtype and errors are those of `box_iou`. Two boxes without area get -1, or 0 where they lie on one
    line along an axis, because their enclosing box has no area either.
    """
    _check_boxes("a", a)
    _check_boxes("b", b)
    return generalized_iou(corners(a[..., :, None, :]), corners(b[..., None, :, :]))


def corners(boxes: Float[Array | np.ndarray, "... 4"]) -> tuple[Array, Array, Array, Array]:
    """x0, y0, x1 and y1 as separate arrays [...], in float32 at least.

    In one array with a last axis of 4, most of a TPU's 128 lanes would hold padding.
    """
    wide = jnp.asarray(boxes, jnp.promote_types(boxes.dtype, jnp.float32))
    return wide[..., 0], wide[..., 1], wide[..., 2], wide[..., 3]


def iou(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    """`box_iou` of boxes as `corners` returns them; the two broadcast."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def generalized_iou(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    """`generalized_box_iou` of boxes as `corners` returns them; the two broadcast."""
    intersection, union = _intersection_and_union(a, b)
    enclosing = _area(*(jnp.minimum(a[i], b[i]) for i in (0, 1)), *(jnp.maximum(a[i], b[i]) for i in (2, 3)))
    return _ratio(intersection, union) - _ratio(enclosing - union, enclosing)


def _intersection_and_union(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, Array]:
    intersection = _area(*(jnp.maximum(a[i], b[i]) for i in (0, 1)), *(jnp.minimum(a[i], b[i]) for i in (2, 3)))
    return intersection, _area(*a) + _area(*b) - intersection


def _ratio(numerator: Array, area: Array) -> Array:
    return numerator / jnp.maximum(area, SMALLEST_AREA)


def _area(x0: Array, y0: Array, x1: Array, y1: Array) -> Array:
    return jnp.maximum(x1 - x0, 0) * jnp.maximum(y1 - y0, 0)


def _check_boxes(name: str, boxes: Array | np.ndarray) -> None:
    check_array(name, boxes)
    check(boxes.ndim >= 2 and boxes.shape[-1] == 4, f"{name} must be [..., boxes, 4], not of shape {boxes.shape}.")
