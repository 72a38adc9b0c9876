"""Which box each point learns: ATSS and TAL for PicoDet v2, SimOTA for the legacy one. One image; vmap gives a batch.

Shapes are static, and boxes are padded: a matrix [boxes, points] says which points each box claims, and sums over its
rows read off the labels and boxes of the points. Ties go to the lower index. No gradient passes.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from castling_jax.errors import check_at_least
from castling_jax.ops.boxes import corners, generalized_iou, iou
from castling_jax.ops.checks import check_shapes
from castling_jax.tasks.detection.losses import varifocal_loss

ATSS_CANDIDATES = 9  # the nearest points of each level
ATSS_ANCHOR = 5  # side of a point's square anchor, in strides
TAL_CANDIDATES = 13  # the best aligned points
TAL_POWER = 6  # of the IoU in the alignment
INSIDE = 1e-9  # ATSS and TAL: a point is inside a box by more than this many pixels
SIMOTA_CANDIDATES = 10  # the best IoUs, whose sum says how many points a box claims
SIMOTA_RADIUS = 2.5  # around a box's centre, in strides
SIMOTA_IOU_WEIGHT = 6.0
SIMOTA_FAR = 1e8  # added to the cost of a point that is not both inside the box and near its centre

Points: TypeAlias = Float[Array | np.ndarray, "points 2"]
Strides: TypeAlias = Float[Array | np.ndarray, " points"]
PredictedBoxes: TypeAlias = Float[Array | np.ndarray, "points 4"]
PredictedScores: TypeAlias = Float[Array | np.ndarray, "points classes"]
Boxes: TypeAlias = Float[Array | np.ndarray, "boxes 4"]
Classes: TypeAlias = Int[Array | np.ndarray, " boxes"]
Valid: TypeAlias = Shaped[Array | np.ndarray, " boxes"]
Claims: TypeAlias = Bool[Array, "boxes points"]
Matrix: TypeAlias = Float[Array, "boxes points"]
Sides: TypeAlias = tuple[Array, ...]
Assigned: TypeAlias = tuple[Int[Array, " points"], Float[Array, "points 4"], Float[Array, "points num_classes"]]


def assign_atss(
    points: Points,
    strides: Strides,
    counts: tuple[int, ...],
    pred_boxes: PredictedBoxes,
    boxes: Boxes,
    classes: Classes,
    valid: Valid,
    num_classes: int,
) -> Assigned:
    """Adaptive training sample selection (Zhang et al., ATSS, algorithm 1) with the soft scores of PicoDet v2.

    A box's candidates are the 9 points of each level that are nearest to its centre, or all points of a level with
    fewer. It claims the candidates inside it whose anchor, a square of 5 strides, has an IoU with the box strictly
    above the mean plus the unbiased standard deviation over all candidates. A point that several boxes claim goes to
    the box with the highest IoU with its anchor among all valid boxes of the image, claimants or not.

    Args:
      points: (x, y) in pixels, level by level.
      strides: of the points, in pixels.
      counts: number of points of each level; static.
      pred_boxes: the boxes now predicted (x0, y0, x1, y1), in pixels.
      boxes: the true boxes, in pixels, at least one row; padded rows may hold anything finite.
      classes: of the true boxes, from 0.
      valid: True, or 1, for true boxes; False, or 0, for padding. A box without area claims no point.
      num_classes: the classes there are, which is also the label of the background.

    Returns:
      labels [points] in int32; boxes [points, 4] in pixels, 0 where background; scores [points, num_classes]: in the
      column of the label the IoU of the predicted with the true box, elsewhere 0.

    Raises:
      InputError: shapes do not fit, or there is no row for boxes.
    """
    _check_truth(boxes, classes, valid)
    count = sum(counts)
    check_shapes(points=(points, (count, 2)), strides=(strides, (count,)), pred_boxes=(pred_boxes, (count, 4)))
    sides, real = _sides_of_rows(boxes), _column(valid).astype(bool)
    x, y = jnp.asarray(points).T
    center_x, center_y = _centers(sides)
    squared_distance = (center_x - x) ** 2 + (center_y - y) ** 2
    levels = jnp.split(squared_distance, np.cumsum(counts)[:-1], axis=1)
    near = jnp.concatenate([_lowest(level, ATSS_CANDIDATES) for level in levels], axis=1)

    half = ATSS_ANCHOR / 2 * jnp.asarray(strides)
    overlap = iou(sides, (x - half, y - half, x + half, y + half))
    candidates = sum(min(ATSS_CANDIDATES, number) for number in counts)
    mean = jnp.where(near, overlap, 0).sum(1, keepdims=True) / candidates
    variance = jnp.where(near, (overlap - mean) ** 2, 0).sum(1, keepdims=True) / (candidates - 1)
    inside = _depth(sides, x, y) > INSIDE
    claims = near & inside & real & (overlap > mean + jnp.sqrt(variance))
    claims = _settle(claims, jnp.where(real, overlap, -jnp.inf))
    return _read_off(claims, sides, classes, iou(sides, _predicted(pred_boxes)), num_classes)


def assign_tal(
    points: Points,
    pred_scores: PredictedScores,
    pred_boxes: PredictedBoxes,
    boxes: Boxes,
    classes: Classes,
    valid: Valid,
) -> Assigned:
    """Task alignment learning's assigner (Feng et al., TOOD, section 3.2.1) with PicoDet v2's constants.

    The alignment of a point with a box is t = score of the box's class * IoU^6 of the predicted with the true box. A
    box claims the 13 best aligned of the points inside it. A point that several boxes claim goes to the box with the
    highest IoU with its prediction among all valid boxes of the image, claimants or not.

    Args:
      points: (x, y) in pixels.
      pred_scores: the scores now predicted, from 0 to 1.
      pred_boxes: the boxes now predicted (x0, y0, x1, y1), in pixels.
      boxes, classes, valid: the truth, as `assign_atss` takes it.

    Returns:
      labels, boxes and scores as from `assign_atss`; the soft score is t / (largest t of the box + 1e-9) * largest IoU
      of the box, both over the points that the box got.

    Raises:
      InputError: shapes do not fit, or there is no row for boxes.
    """
    _check_truth(boxes, classes, valid)
    check_shapes(points=(points, (len(pred_scores), 2)), pred_boxes=(pred_boxes, (len(pred_scores), 4)))
    sides, real = _sides_of_rows(boxes), _column(valid).astype(bool)
    overlap = iou(sides, _predicted(pred_boxes))
    alignment = _scores_of_classes(pred_scores, classes) * overlap**TAL_POWER
    eligible = (_depth(sides, *jnp.asarray(points).T) > INSIDE) & real
    claims = _lowest(jnp.where(eligible, -alignment, jnp.inf), TAL_CANDIDATES)
    claims = _settle(claims, jnp.where(real, overlap, -jnp.inf))

    got, got_overlap = jnp.where(claims, alignment, 0), jnp.where(claims, overlap, 0)
    score = got / (got.max(1, keepdims=True) + 1e-9) * got_overlap.max(1, keepdims=True)
    return _read_off(claims, sides, classes, score, pred_scores.shape[1])


def assign_simota(
    points: Points,
    strides: Strides,
    pred_scores: PredictedScores,
    pred_boxes: PredictedBoxes,
    boxes: Boxes,
    classes: Classes,
    valid: Valid,
) -> Assigned:
    """SimOTA (Ge et al., YOLOX, section 2.2, after OTA) as the legacy PicoDet has it.

    Candidates are the points inside any valid box or, along both axes, within 2.5 strides of its centre. The cost of a
    candidate for a box is the varifocal loss over all classes, with the IoU as the target of the box's class; plus
    6 * (1 - GIoU); plus 1e8 unless the point is both inside the box and near its centre. A box claims its k cheapest
    candidates, where k = max(1, floor of the sum of its 10 best IoUs). A point that several boxes claim goes to the
    box that it costs least, claimant or not. Costs are float32: beyond 1e8 their step is 8, so such points often tie.

    Args:
      points: (x, y) in pixels.
      strides: of the points, in pixels.
      pred_scores: the scores now predicted, from 0 to 1.
      pred_boxes: the boxes now predicted (x0, y0, x1, y1), in pixels.
      boxes, classes, valid: the truth, as `assign_atss` takes it, but a box without area claims one point.

    Returns:
      labels, boxes and scores as from `assign_atss`.

    Raises:
      InputError: shapes do not fit, or there is no row for boxes.
    """
    _check_truth(boxes, classes, valid)
    count, num_classes = pred_scores.shape
    check_shapes(points=(points, (count, 2)), strides=(strides, (count,)), pred_boxes=(pred_boxes, (count, 4)))
    sides, real = _sides_of_rows(boxes), _column(valid).astype(bool)
    x, y = jnp.asarray(points).T
    radius = SIMOTA_RADIUS * jnp.asarray(strides)
    center_x, center_y = _centers(sides)
    inside = _depth(sides, x, y) > 0
    near = _depth((center_x - radius, center_y - radius, center_x + radius, center_y + radius), x, y) > 0
    candidates = ((inside | near) & real).any(0) & real

    predicted, scores = _predicted(pred_boxes), jax.lax.stop_gradient(jnp.asarray(pred_scores, jnp.float32))
    overlap, own = iou(sides, predicted), _scores_of_classes(scores, classes)
    negatives = varifocal_loss(scores, jnp.zeros_like(scores)).sum(1)
    loss = negatives - varifocal_loss(own, jnp.zeros_like(own)) + varifocal_loss(own, overlap)
    loss += SIMOTA_IOU_WEIGHT * (1 - generalized_iou(sides, predicted))
    cost = jnp.where(candidates, loss + jnp.where(inside & near, 0, SIMOTA_FAR), jnp.inf)

    best = jax.lax.top_k(jnp.where(candidates, overlap, 0), min(SIMOTA_CANDIDATES, count))[0]
    number = jnp.maximum(jnp.floor(best.sum(1, keepdims=True)), 1)
    claims = _lowest(cost, SIMOTA_CANDIDATES, number)
    claims = _settle(claims, -cost)
    return _read_off(claims, sides, classes, overlap, num_classes)


def _check_truth(boxes: Boxes, classes: Classes, valid: Valid) -> None:
    rows = len(boxes)
    check_at_least("the number of rows in boxes", rows, 1)
    check_shapes(boxes=(boxes, (rows, 4)), classes=(classes, (rows,)), valid=(valid, (rows,)))


def _column(values: Shaped[Array | np.ndarray, " boxes"]) -> Shaped[Array, "boxes 1"]:
    return jnp.asarray(values)[:, None]


def _sides_of_rows(boxes: Boxes) -> Sides:
    """x0, y0, x1 and y1, each [boxes, 1]."""
    return tuple(_column(side) for side in corners(boxes))


def _predicted(boxes: PredictedBoxes) -> Sides:
    """x0, y0, x1 and y1, each [points], without their gradient."""
    return corners(jax.lax.stop_gradient(jnp.asarray(boxes)))


def _centers(sides: Sides) -> tuple[Array, Array]:
    return (sides[0] + sides[2]) / 2, (sides[1] + sides[3]) / 2


def _depth(sides: Sides, x: Array, y: Array) -> Matrix:
    """How far each point is inside each box, up to the nearest side; negative outside."""
    x0, y0, x1, y1 = sides
    return jnp.minimum(jnp.minimum(x - x0, x1 - x), jnp.minimum(y - y0, y1 - y))


def _scores_of_classes(scores: PredictedScores, classes: Classes) -> Matrix:
    """The score of each box's class at each point, in float32 and without its gradient."""
    rows = jax.lax.stop_gradient(jnp.asarray(scores, jnp.float32)).T
    return jnp.take(rows, jnp.asarray(classes), axis=0, mode="clip")  # a padded row's class may be any


def _lowest(values: Matrix, most: int, number: Float[Array, "boxes 1"] | float = jnp.inf) -> Claims:
    """The `most` lowest values of each row, or the first `number` of them; infinite values are never taken.

    A loop takes them one by one: so few cost less than a sort of thousands, and ties go to the lower index for sure.
    """
    places = jnp.arange(values.shape[1])

    def take_one(rank: Array, left: Matrix) -> Matrix:
        lowest = left == left.min(1, keepdims=True)  # faster on a CPU than argmin
        first = jnp.where(lowest, places, values.shape[1]).min(1, keepdims=True)
        return jnp.where((places == first) & (rank < number), jnp.inf, left)

    return (jax.lax.fori_loop(0, most, take_one, values) == jnp.inf) & (values < jnp.inf)


def _settle(claims: Claims, preference: Matrix) -> Claims:
    """Gives each point that several boxes claim to the box with the highest preference, whether it claims it or not."""
    winner = jnp.arange(len(claims))[:, None] == preference.argmax(0)
    return jnp.where(claims.sum(0) > 1, winner, claims)


def _read_off(claims: Claims, sides: Sides, classes: Classes, score: Matrix, num_classes: int) -> Assigned:
    """Labels, boxes and scores of the points, from claims with at most one box for each point."""

    def of_points(values: Array) -> Array:  # exact sums of one number, where a TPU would gather slowly
        return jnp.where(claims, values, 0).sum(0)

    labels = jnp.where(claims.any(0), of_points(_column(classes)), num_classes).astype(jnp.int32)
    scores = jax.nn.one_hot(labels, num_classes) * of_points(score)[:, None]
    return labels, jnp.stack([of_points(side) for side in sides], axis=1), scores
