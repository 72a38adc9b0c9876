"""Bridge attention: a few global tokens gather information from all tokens and pass it back to them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.models.attention.core import Core, Places
from castling_jax.models.attention.heads import check_heads_divide, split_heads
from castling_jax.models.layers import Layers, split_linear

GLOBAL_TOKENS = 6  # as in Mobile-Former's models


class BridgeAttention(nnx.Module):
    """Mobile-Former's two-way bridge (Chen et al., CVPR 2022, equations 1 and 2): linear in tokens.

    With x the tokens, z the learned global tokens and attn(q, k, v) = softmax(q k^T / sqrt(d)) v in each head,

        z' = z + [attn((z W_Q)_h, x_h, x_h)]_h W_O        equation 1, Mobile -> Former
        output = [attn(x_h, (z' W_K)_h, (z' W_V)_h)]_h    equation 2, Mobile <- Former

    The tokens have no projections of their own, as in the paper: all matrices act on the six global tokens, and the
    block's residual adds the output to the tokens.

    Two parts of the paper are left out. One is the Former's block between the two equations: attention among the global
    tokens, and an MLP. The other is the global tokens' path from block to block: here each block learns its own. The
    paper has no class token. Here the class token is a token like all others.

    Raises:
      InputError: the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, core: Core, layers: Layers, *, qkv_bias: bool):
        check_heads_divide(dim, num_heads)
        self.num_heads = num_heads
        self.core = core
        self.global_tokens = layers.embedding(1, GLOBAL_TOKENS, dim)
        self.q = layers.linear(dim, dim, use_bias=qkv_bias)
        self.proj = layers.linear(dim, dim)
        self.kv = layers.linear(dim, 2 * dim, use_bias=qkv_bias)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        places: Places,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, ""]]:
        attention, heads = self.core.kind.function, split_heads(x, self.num_heads)
        # All images share the global tokens, so the queries are projected once and then broadcast over the batch.
        z = self.global_tokens[...].astype(x.dtype)
        with jax.named_scope("qkv"):
            q = split_heads(self.q(z), self.num_heads)
        gathered = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape[1:])), heads, heads)
        with jax.named_scope("proj"):
            # This residual is equation 1's own: from here on the global tokens differ from image to image.
            z = z + self.proj(gathered.reshape(x.shape[0], *z.shape[1:]))
        with jax.named_scope("qkv"):
            k, v = (split_heads(part, self.num_heads) for part in split_linear(self.kv, z, 2))
        return attention(heads, k, v).reshape(x.shape), jnp.zeros((), jnp.float32)
