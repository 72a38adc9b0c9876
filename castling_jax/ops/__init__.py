"""The mathematics: pure functions, arrays in, arrays out."""

from castling_jax.ops.angular import (
    angular_attention,
    angular_kernel,
    angular_kernel_series,
    linear_angular_attention,
)
from castling_jax.ops.boxes import box_iou, generalized_box_iou
from castling_jax.ops.castling import castling_attention
from castling_jax.ops.depthwise import depthwise_convolution
from castling_jax.ops.masked_softmax import masked_softmax_attention
from castling_jax.ops.suppression import non_maximum_suppression

__all__ = [
    "angular_attention",
    "angular_kernel",
    "angular_kernel_series",
    "box_iou",
    "castling_attention",
    "depthwise_convolution",
    "generalized_box_iou",
    "linear_angular_attention",
    "masked_softmax_attention",
    "non_maximum_suppression",
]
