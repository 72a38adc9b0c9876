"""The parameters of an encoder block, as a value."""

from typing import NamedTuple

from jaxtyping import Array, Float


class BlockWeights(NamedTuple):
    """The parameters of an encoder block, under the names that they have in DeiT."""

    norm1_scale: Float[Array, "channels"]
    norm1_bias: Float[Array, "channels"]
    qkv_kernel: Float[Array, "channels three_channels"]  # queries, keys and values, each head by head
    qkv_bias: Float[Array, "three_channels"] | None
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None
    proj_kernel: Float[Array, "channels channels"]
    proj_bias: Float[Array, "channels"]
    norm2_scale: Float[Array, "channels"]
    norm2_bias: Float[Array, "channels"]
    fc1_kernel: Float[Array, "channels hidden"]
    fc1_bias: Float[Array, "hidden"]
    fc2_kernel: Float[Array, "hidden channels"]
    fc2_bias: Float[Array, "channels"]
