"""Layers that the backbones share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# DeiT and MViTv2 start their matrices, tokens and position embeddings from timm's trunc_normal_(std=0.02). It cuts at
# -2 and 2, a hundred deviations away, so it is a normal; JAX's truncated_normal cuts at two deviations.
DEIT_STD = 0.02


def normal_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A token or position embedding: a parameter drawn from a normal of standard deviation 0.02."""
    return nnx.Param(jax.nn.initializers.normal(DEIT_STD)(rngs.params(), shape, dtype))


def linear(
    features_in: int,
    features_out: int,
    *,
    use_bias: bool = True,
    init_std: float = DEIT_STD,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer that starts as the ViT family's do: a normal of `init_std`, zero bias."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=jax.nn.initializers.normal(init_std),
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
            # As PyTorch, and so DeiT, starts a convolution: uniform of variance 1 / (3 fan_in).
            kernel_init=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens embed_dim"]:
        patches = self.proj(images)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


class Mlp(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them; `layer` is what `linear` takes."""

    def __init__(self, dim: int, hidden_dim: int, **layer: Any):
        self.fc1 = linear(dim, hidden_dim, **layer)
        self.fc2 = linear(hidden_dim, dim, **layer)

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
