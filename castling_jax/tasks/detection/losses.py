"""The losses of PicoDet (Yu et al. 2021, section 3.3), as totals over a batch."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from castling_jax.errors import InputError
from castling_jax.ops.boxes import corners, generalized_iou
from castling_jax.ops.checks import check_shapes
from castling_jax.ops.points import decode_boxes

VARIFOCAL_ALPHA = 0.75  # weight of the negatives, with the square of their score
SCORE_RANGE = (1e-12, 1 - 2**-24)  # whose logarithms, of the score and of 1 - score, are finite in float32
GIOU_WEIGHT, DFL_WEIGHT = 2.5, 0.5
LEGACY_GIOU_WEIGHT, LEGACY_DFL_WEIGHT = 2.0, 0.25

Values: TypeAlias = Float[Array | np.ndarray, "*axes"]
Bins: TypeAlias = Float[Array | np.ndarray, "*axes bins"]
Boxes: TypeAlias = Float[Array | np.ndarray, "*axes 4"]
Points: TypeAlias = Float[Array | np.ndarray, "points 2"]
Strides: TypeAlias = Float[Array | np.ndarray, " points"]
Assigned: TypeAlias = tuple[
    Int[Array | np.ndarray, "*batch points"],
    Float[Array | np.ndarray, "*batch points 4"],
    Float[Array | np.ndarray, "*batch points classes"],
]
Outputs: TypeAlias = Mapping[str, Float[Array | np.ndarray, "..."]]
Scalar: TypeAlias = Float[Array, ""]


def varifocal_loss(scores: Values, targets: Values) -> Float[Array, "*axes"]:
    """Binary cross entropy, weighted by the target, or by 0.75 * score^2 where it is 0 (VarifocalNet, equation 2).

    Args:
      scores: from 0 to 1. They are clipped to [1e-12, 1 - 2^-24], beyond which no gradient passes.
      targets: from 0 to 1; 0 where there is no object of the class.

    Returns:
      The loss of each entry, in float32 at least.
    """
    score, targets = jnp.clip(_wide(scores), *SCORE_RANGE), _wide(targets)
    entropy = -targets * jnp.log(score) - (1 - targets) * jnp.log1p(-score)
    return _varifocal_weights(score, targets) * entropy


def varifocal_loss_of_logits(logits: Values, targets: Values) -> Float[Array, "*axes"]:
    """`varifocal_loss` of the sigmoid of `logits`, which needs no clipping."""
    logits, targets = _wide(logits), _wide(targets)
    return _varifocal_weights(jax.nn.sigmoid(logits), targets) * optax.sigmoid_binary_cross_entropy(logits, targets)


def distribution_focal_loss(logits: Bins, targets: Values) -> Float[Array, "*axes"]:
    """Cross entropy with the two bins beside the target (Li et al., Generalized Focal Loss, equation 6).

    Args:
      logits: of the distances 0, 1, ..., bins - 1.
      targets: distances, clipped to [0, bins - 1.1]. Both neighbours get the linear share 1 - |target - distance|.

    Returns:
      The loss of each distance in nats, in float32 at least.
    """
    bins = logits.shape[-1]
    inside = jnp.clip(_wide(targets), 0, bins - 1.1)
    shares = jax.nn.relu(1 - jnp.abs(inside[..., None] - jnp.arange(bins)))
    return optax.softmax_cross_entropy(_wide(logits), shares)


def giou_loss(boxes: Boxes, targets: Boxes) -> Float[Array, "*axes"]:
    """1 - GIoU, box by box, from 0 to 2 (Rezatofighi et al., GIoU, algorithm 1); finite, with its gradient, for all."""
    return 1 - generalized_iou(corners(boxes), corners(targets))


def detection_losses(outputs: Outputs, assigned: Assigned, points: Points, strides: Strides) -> dict[str, Scalar]:
    """The losses of PicoDet v2 as sums, which `mean_losses` divides once over the global batch.

    varifocal sums `varifocal_loss` over points and classes with the assigned scores as targets. giou is 2.5 times and
    dfl 0.5 times the sum over points of the assigned score (the sum of its row) times the loss of the box; dfl's is the
    mean over the four sides. Distances and boxes are divided by the stride first.

    Args:
      outputs: the model's "scores" [*batch, points, classes] from 0 to 1 and "reg_logits" [*batch, points, 4 * bins].
        Boxes are decoded from the latter here; other entries are not read.
      assigned: labels [*batch, points], boxes [*batch, points, 4] in pixels and scores [*batch, points, classes], as
        `assign_atss` and `assign_tal` give them.
      points: (x, y) in pixels.
      strides: of the points, in pixels.

    Returns:
      varifocal, giou, dfl, and normaliser, the sum of the assigned scores: float32 scalars. Those of several batches or
      devices may be added.

    Raises:
      InputError: an output is missing or a shape does not fit.
    """
    names = ("scores", "reg_logits")
    scores, reg_logits, _, boxes, targets = _checked(outputs, names, assigned, points, strides)
    weights = targets.sum(-1)
    giou, dfl = _box_losses(reg_logits, boxes, weights, points, strides)
    return {
        "varifocal": varifocal_loss(scores, targets).sum(),
        "giou": GIOU_WEIGHT * giou,
        "dfl": DFL_WEIGHT * dfl,
        "normaliser": weights.sum(),
    }


def legacy_detection_losses(
    outputs: Outputs, assigned: Assigned, points: Points, strides: Strides
) -> dict[str, Scalar]:
    """The losses of the legacy PicoDet as sums, which `mean_losses` divides once over the global batch.

    As `detection_losses`, but a positive's box is weighted by its largest class score now predicted, without gradient,
    giou by 2 and dfl by 0.25.

    Args:
      outputs: the model's "cls_logits" [*batch, points, classes] and "reg_logits" [*batch, points, 4 * bins].
      assigned: as `assign_simota` gives it; its scores are the IoUs of the predicted boxes.
      points, strides: as in `detection_losses`.

    Returns:
      varifocal, giou, dfl; normaliser, the sum of the positives' weights; and positives, their number, which is the
      normaliser of varifocal: float32 scalars.

    Raises:
      InputError: an output is missing or a shape does not fit.
    """
    names = ("cls_logits", "reg_logits")
    logits, reg_logits, labels, boxes, targets = _checked(outputs, names, assigned, points, strides)
    positive = labels < logits.shape[-1]
    best = jax.nn.sigmoid(jax.lax.stop_gradient(logits)).max(-1)
    weights = jnp.where(positive, best, 0)
    giou, dfl = _box_losses(reg_logits, boxes, weights, points, strides)
    return {
        "varifocal": varifocal_loss_of_logits(logits, targets).sum(),
        "giou": LEGACY_GIOU_WEIGHT * giou,
        "dfl": LEGACY_DFL_WEIGHT * dfl,
        "normaliser": weights.sum(),
        "positives": positive.sum().astype(jnp.float32),
    }


def mean_losses(totals: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """varifocal, giou and dfl divided by their normaliser; their sum is the loss.

    The normaliser is at least 1: a batch without positives, whose normaliser is 0, has a finite loss.

    Args:
      totals: of `detection_losses` or `legacy_detection_losses`, added up over the global batch.
    """
    boxes = jnp.maximum(totals["normaliser"], 1)
    varifocal = jnp.maximum(totals.get("positives", totals["normaliser"]), 1)
    return {
        "varifocal": totals["varifocal"] / varifocal,
        "giou": totals["giou"] / boxes,
        "dfl": totals["dfl"] / boxes,
    }


def _box_losses(
    reg_logits: Float[Array, "*batch points sides_bins"],
    targets: Float[Array, "*batch points 4"],
    weights: Float[Array, "*batch points"],
    points: Points,
    strides: Strides,
) -> tuple[Scalar, Scalar]:
    """The weighted sums of GIoU loss and distribution focal loss, in units of the strides."""
    centers, scaled = points / strides[:, None], targets / strides[:, None]
    giou = giou_loss(decode_boxes(reg_logits, centers, jnp.ones_like(strides)), scaled)
    distances = jnp.concatenate([centers - scaled[..., :2], scaled[..., 2:] - centers], axis=-1)
    bins = reg_logits.reshape(*reg_logits.shape[:-1], 4, -1)
    dfl = distribution_focal_loss(bins, distances).mean(-1)
    return (weights * giou).sum(), (weights * dfl).sum()


def _varifocal_weights(scores: Float[Array, "*axes"], targets: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    return jnp.where(targets > 0, targets, VARIFOCAL_ALPHA * scores**2)


def _wide(x: Values) -> Float[Array, "*axes"]:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _checked(
    outputs: Outputs, names: tuple[str, str], assigned: Assigned, points: Points, strides: Strides
) -> tuple[Array, Array, Array, Array, Array]:
    """The outputs of these names and the labels, boxes and scores that are assigned, in float32; all shapes fit."""
    missing = [name for name in names if name not in outputs]
    if missing:
        raise InputError(f"outputs must have {' and '.join(names)}, not only {', '.join(outputs) or 'nothing'}.")
    predictions, reg_logits = (_wide(outputs[name]) for name in names)
    labels, boxes, scores = assigned
    axes, count = predictions.shape[:-1], predictions.shape[-2]
    check_shapes(reg_logits=(reg_logits, (*axes, reg_logits.shape[-1])))
    check_shapes(labels=(labels, axes), boxes=(boxes, (*axes, 4)), scores=(scores, predictions.shape))
    check_shapes(points=(points, (count, 2)), strides=(strides, (count,)))
    return predictions, reg_logits, jnp.asarray(labels), _wide(boxes), _wide(scores)
