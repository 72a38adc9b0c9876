"""Convolutional attention: a depthwise convolution of the grid before queries, keys and values."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.layers import Layers, Pool, split_linear, stop_at_zero

STRIDES = ((1, 1), (2, 2), (2, 2))  # of queries, keys and values


class ConvolutionalAttention(MultiHeadAttention):
    """Softmax attention with convolutional projections (Wu et al., CvT, ICCV 2021, section 3.2, equation 2).

    Queries, keys and values each have a depthwise 3 x 3 convolution of the grid and a norm before their linear
    projection. Keys and values have stride 2, the paper's squeezed projection, as CvT's models have it: their number is
    a quarter, and the attention is still quadratic in tokens. Prefix tokens pass by convolution and norm, as CvT's
    class token does.

    The norm is ours: CvT has batch norm there, and a plain transformer has no statistics, so this is layer norm. Scores
    are divided by the square root of a head's width; CvT's code takes the width of all heads.
    """

    def add_layers(self, layers: Layers) -> None:
        dim = self.num_heads * self.key_dim
        self.pool_q, self.pool_k, self.pool_v = (Pool(dim, layers) for _ in STRIDES)
        self.norm_q, self.norm_k, self.norm_v = (layers.layer_norm(dim) for _ in STRIDES)

    def project(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], prefix_tokens: int
    ) -> Sequence[Float[Array, "batch _ channels"]]:
        batch, _, channels = x.shape
        patches = x[:, prefix_tokens:].reshape(batch, *grid, channels)
        pools = (self.pool_q, self.norm_q), (self.pool_k, self.norm_k), (self.pool_v, self.norm_v)
        inputs = []
        for (pool, norm), stride in zip(pools, STRIDES, strict=True):
            pooled = norm(stop_at_zero(pool(patches, stride))).reshape(batch, -1, channels)
            inputs.append(jnp.concatenate([x[:, :prefix_tokens], pooled], axis=1))
        return split_linear(self.qkv, inputs, 3)
