"""Detection as PicoDet does it: points, the boxes they are assigned to, and the losses. Arrays in, arrays out."""

from castling_jax.ops.points import STRIDES, decode_boxes, level_points
from castling_jax.tasks.detection.assign import assign_atss, assign_simota, assign_tal
from castling_jax.tasks.detection.losses import (
    detection_losses,
    distribution_focal_loss,
    giou_loss,
    legacy_detection_losses,
    mean_losses,
    varifocal_loss,
    varifocal_loss_of_logits,
)

__all__ = [
    "STRIDES",
    "assign_atss",
    "assign_simota",
    "assign_tal",
    "decode_boxes",
    "detection_losses",
    "distribution_focal_loss",
    "giou_loss",
    "legacy_detection_losses",
    "level_points",
    "mean_losses",
    "varifocal_loss",
    "varifocal_loss_of_logits",
]
