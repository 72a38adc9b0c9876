"""Layers that the backbones share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

KERNEL_STD = 0.02  # truncated normal, as DeiT and MViTv2 start their matrices and position embeddings


def truncated_normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter drawn from a normal of standard deviation 0.02, cut at two of them."""
    return nnx.Param(jax.nn.initializers.truncated_normal(KERNEL_STD)(rngs.params(), shape, dtype))


def linear(
    features_in: int,
    features_out: int,
    *,
    use_bias: bool = True,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer that starts as the ViT family's do: truncated normal of 0.02, zero bias."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=jax.nn.initializers.truncated_normal(KERNEL_STD),
        rngs=rngs,
    )


def layer_norm(features: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation with the epsilon of DeiT and MViTv2."""
    return nnx.LayerNorm(features, epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.proj = nnx.Conv(
            in_chans,
            embed_dim,
            (patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=jax.nn.initializers.truncated_normal(KERNEL_STD),
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens embed_dim"]:
        patches = self.proj(images)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


class Mlp(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = linear(hidden_dim, dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def drop_path(x: Float[Array, "batch *axes"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "batch *axes"]:
    """Stochastic depth: drops a residual branch of whole samples, and scales the others up to keep the mean.

    Without a key, as in evaluation, it does nothing.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
