"""Multi-head self-attention for plain transformers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.errors import check
from castling_jax.models.attention.core import Core, Places
from castling_jax.models.layers import Layers, Pool, split_linear


def split_heads(x: Float[Array, "batch tokens channels"], num_heads: int) -> Float[Array, "batch tokens heads dim"]:
    """Cuts the channels into heads."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def check_heads_divide(dim: int, num_heads: int) -> None:
    """Raises an InputError unless the heads divide the width."""
    check(num_heads >= 1 and dim % num_heads == 0, f"{num_heads} heads do not divide the width {dim}.")


class MultiHeadAttention(nnx.Module):
    """Self-attention with fused qkv, whose rows are ordered q, k, v, then head, then head_dim.

    A subclass may add layers (`add_layers`), and replace the step from tokens to q, k and v (`project`) or the step
    from q, k and v to the heads' output (`attend`).

    Args:
      dim: width, a multiple of num_heads.
      num_heads: heads.
      core: the attention between the projections.
      layers: makes the layers.
      qkv_bias: whether the qkv projection has a bias.

    Raises:
      InputError: the heads do not divide the width.
    """

    token_kernel: nnx.Param | None

    def __init__(self, dim: int, num_heads: int, core: Core, layers: Layers, *, qkv_bias: bool):
        check_heads_divide(dim, num_heads)
        self.num_heads = num_heads
        self.key_dim = self.value_dim = dim // num_heads
        self.core = core
        self.qkv = layers.linear(dim, 3 * dim, use_bias=qkv_bias)
        self.proj = layers.linear(dim, dim)
        if core.pools_qkv:
            # These kernels start at zero, as the taps do, so that a new model starts as DeiT.
            zeros = jax.nn.initializers.zeros
            self.pool_q, self.pool_k, self.pool_v = (Pool(self.key_dim, layers, zeros) for _ in range(3))
        core.add_parameters(self, layers)
        self.add_layers(layers)

    def add_layers(self, layers: Layers) -> None:
        """Adds a subclass's own layers; the width is `num_heads * key_dim`."""

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        places: Places,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, ""]]:
        """The output and the mask density."""
        with jax.named_scope("qkv"):
            q, k, v = (split_heads(part, self.num_heads) for part in self.project(x, places))
        out, density = self.attend(q, k, v, places, mask_threshold)
        with jax.named_scope("proj"):
            return self.proj(out.reshape(x.shape)), density

    def project(
        self, x: Float[Array, "batch tokens channels"], places: Places
    ) -> Sequence[Float[Array, "batch _ channels"]]:
        """Queries, keys and values, all heads side by side."""
        parts = split_linear(self.qkv, x, 3)
        if not self.core.pools_qkv:
            return parts
        pools = (self.pool_q, self.pool_k, self.pool_v)
        return [_add_pooled(part, pool, places) for part, pool in zip(parts, pools, strict=True)]

    def attend(
        self,
        q: Float[Array, "batch tokens heads dim"],
        k: Float[Array, "batch keys heads dim"],
        v: Float[Array, "batch keys heads dim"],
        places: Places,
        mask_threshold: ArrayLike | None,
    ) -> tuple[Float[Array, "batch tokens heads dim"], Float[Array, ""]]:
        """The heads' output before the projection, and the mask density."""
        return self.core.kind(q, k, v, mask_threshold=mask_threshold, **vars(places), **self.core.inputs_of(self))


def _add_pooled(
    x: Float[Array, "batch tokens channels"], pool: Pool, places: Places
) -> Float[Array, "batch tokens channels"]:
    """Adds to the patches their convolution over the grid; prefix tokens, which have no place there, do not change."""
    patches = x[:, places.prefix_tokens :]
    pooled = pool(patches.reshape(x.shape[0], *places.grid, x.shape[2])).reshape(patches.shape)
    return jnp.concatenate([x[:, : places.prefix_tokens], patches + pooled], axis=1)
