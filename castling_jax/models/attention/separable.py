"""Separable self-attention: one latent token replaces the queries."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.models.attention.core import Core, Places
from castling_jax.models.layers import Layers, split_linear


@jax.named_scope("separable")
def separable_attention(
    scores: Float[Array, "batch tokens 1"],
    k: Float[Array, "batch tokens channels"],
    v: Float[Array, "batch tokens channels"],
) -> Float[Array, "batch tokens channels"]:
    """relu(V) * sum_j softmax(scores)_j k_j, with the softmax over tokens."""
    # In float32, because in bfloat16 the softmax's sum over hundreds of tokens would lose its small terms.
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=1).astype(k.dtype)
    return jax.nn.relu(v) * jnp.einsum("btl,btc->blc", weights, k)


class SeparableAttention(nnx.Module):
    """Separable self-attention (Mehta and Rastegari, MobileViTv2, 2022, section 3.2): linear in tokens.

    Each token's score is its inner product with one latent token, x W_I; a softmax over the tokens turns the scores
    into weights of the keys x W_K, whose weighted sum is the context vector. The output is (relu(x W_V) * context) W_O.

    One latent token gives one set of scores, so there are no heads, whatever the model's num_heads. W_I has no bias,
    which would cancel in the softmax. MobileViTv2 takes the softmax over patches, separately for each pixel in a patch;
    in a plain transformer a token is a patch. The paper has no class token. Here the class token is a token like all
    others.
    """

    def __init__(self, dim: int, num_heads: int, core: Core, layers: Layers, *, qkv_bias: bool):
        self.core = core
        self.latent = layers.linear(dim, 1, use_bias=False)
        self.kv = layers.linear(dim, 2 * dim, use_bias=qkv_bias)
        self.proj = layers.linear(dim, dim)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        places: Places,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, ""]]:
        with jax.named_scope("qkv"):
            scores, (k, v) = self.latent(x), split_linear(self.kv, x, 2)
        out = self.core.kind.function(scores, k, v)
        with jax.named_scope("proj"):
            return self.proj(out), jnp.zeros((), jnp.float32)
