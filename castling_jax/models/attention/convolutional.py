"""Convolutional attention: a depthwise convolution over the grid before the projections to q, k and v."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.models.attention.core import Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.layers import Layers, Pool, split_linear, stop_at_zero

STRIDES = ((1, 1), (2, 2), (2, 2))  # for queries, keys and values


class ConvolutionalAttention(MultiHeadAttention):
    """Softmax attention with convolutional projections (Wu et al., CvT, ICCV 2021, section 3.2, equation 2).

    Queries, keys and values each go through a depthwise 3 x 3 convolution over the grid and a norm before their linear
    projection. Keys and values have stride 2, the paper's squeezed projection, as in CvT's models: there are a quarter
    as many keys as queries, and the attention is still quadratic in tokens. Prefix tokens skip the convolution and the
    norm, as CvT's class token does.

    CvT has batch norm there. This is layer norm, because a plain transformer has no running statistics. Scores are
    divided by the square root of one head's width; CvT's code divides them by the square root of the width of all
    heads.
    """

    def add_layers(self, layers: Layers) -> None:
        dim = self.num_heads * self.key_dim
        self.pool_q, self.pool_k, self.pool_v = (Pool(dim, layers) for _ in STRIDES)
        self.norm_q, self.norm_k, self.norm_v = (layers.layer_norm(dim) for _ in STRIDES)

    def project(
        self, x: Float[Array, "batch tokens channels"], places: Places
    ) -> Sequence[Float[Array, "batch _ channels"]]:
        batch, _, channels = x.shape
        patches = x[:, places.prefix_tokens :].reshape(batch, *places.grid, channels)
        pools = (self.pool_q, self.norm_q), (self.pool_k, self.norm_k), (self.pool_v, self.norm_v)
        inputs = []
        for (pool, norm), stride in zip(pools, STRIDES, strict=True):
            # The convolution has no bias: a black region may give zeros, at which layer norm's derivative is 1000.
            pooled = norm(stop_at_zero(pool(patches, stride))).reshape(batch, -1, channels)
            inputs.append(jnp.concatenate([x[:, : places.prefix_tokens], pooled], axis=1))
        # One fused layer, as in multi-head attention, so that weights keep their names; each part has its own input.
        return split_linear(self.qkv, inputs, 3)
