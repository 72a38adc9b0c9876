"""The mathematics: pure functions, arrays in, arrays out."""

from castling_jax.ops.angular import (
    angular_attention,
    angular_kernel,
    angular_kernel_series,
    linear_angular_attention,
)
from castling_jax.ops.castling import castling_attention
from castling_jax.ops.depthwise import depthwise_convolution
from castling_jax.ops.masked_softmax import masked_softmax_attention

__all__ = [
    "angular_attention",
    "angular_kernel",
    "angular_kernel_series",
    "castling_attention",
    "depthwise_convolution",
    "linear_angular_attention",
    "masked_softmax_attention",
]
