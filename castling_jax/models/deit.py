"""DeiT, the plain vision transformer (Touvron et al., ICML 2021), with any kind of attention."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.core import Core, Places, where_taps_stand
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.backbone import Backbone, BackboneConfig
from castling_jax.models.initializers import scaled_uniform
from castling_jax.models.layers import (
    DEIT_STD,
    TORCH_INIT,
    Layers,
    Mlp,
    draw_drop_path,
    drop_path,
    of_layer,
    patch_grid,
    run_block,
    torch_bias_init,
)
from castling_jax.models.position import resize_position_embedding, sincos_position_embedding
from castling_jax.ops.block_weights import BlockWeights
from castling_jax.ops.patches import convolve_patches
from castling_jax.sizes import image_shape

QKV_POOLS = ("3x3",)
GLOBAL_POOLS = ("token", "avg")
XAVIER_PATCHES = scaled_uniform(1.0, "fan_avg", in_axes=(0, 1, 2))  # a patch's pixels count as inputs of a matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeiTConfig(BackboneConfig):
    """DeiT's constructor arguments.

    Attributes:
      embed_dim: width of the tokens.
      depth: number of blocks.
      num_heads: heads of each attention.
      patch_size: pixels a side of a patch.
      qkv_bias: whether the projection to q, k and v has a bias.
      distilled: whether there is a distillation token, with a head of its own.
      window_size: side of the windows in tokens, for attention="window" only; None is 7.
      init_std: standard deviation of the normal that the dense layers' matrices start from; None as in `Layers`.
      fixed_positions: whether the position embedding is the one of sines and cosines, and is not trained.
      global_pool: what the classifier reads: "token", the class token, or "avg", the mean of the patches, which has a
        layer norm of its own instead of the last block's (timm's word; MAE's fine-tuning has "avg").
      qkv_pool: "3x3" adds to the queries, keys and values their depthwise convolutions over the patches, with one
        kernel for each of the three, which the heads share. None: no such convolutions, as in DeiT. They are our
        reading of the authors' README, whose block has the form of MViTv2's MultiScaleAttention. Its norms are left
        out, so that a new model still starts as DeiT.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    qkv_bias: bool = True
    distilled: bool = False
    token_conv: str | None = "1d"
    window_size: int | None = None
    init_std: float | None = DEIT_STD
    fixed_positions: bool = False
    global_pool: str = "token"
    qkv_pool: str | None = None


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(self, config: DeiTConfig, layers: Layers):
        patch = (config.patch_size, config.patch_size)
        self.proj = nnx.Conv(
            config.in_chans,
            config.embed_dim,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=TORCH_INIT if config.init_std is not None else XAVIER_PATCHES,
            bias_init=torch_bias_init(config.in_chans * config.patch_size**2),
            conv_general_dilated=convolve_patches,
            **layers.flax,
        )

    @jax.named_scope("patch_embed")
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens embed_dim"]:
        patches = self.proj(images)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


class Block(nnx.Module):
    """A pre-norm transformer block, with multi-head attention or the kind's own module."""

    def __init__(self, config: DeiTConfig, core: Core, layers: Layers, *, drop_path_rate: float):
        dim = config.embed_dim
        attention = core.kind.module or MultiHeadAttention
        self.drop_path_rate = drop_path_rate
        self.norm1 = layers.layer_norm(dim)
        self.attn = attention(dim, config.num_heads, core, layers, qkv_bias=config.qkv_bias)
        self.norm2 = layers.layer_norm(dim)
        self.mlp = Mlp(dim, config.mlp_ratio, layers)

    def __call__(self, x, *, places, mask_threshold, drawn, then=None, needed_tokens=None):
        """The tokens after the block and `then`, at least the first `needed_tokens` (None: all); the mask density."""

        def by_layers(x):
            attended, density = self.attn(self.norm1(x), places=places, mask_threshold=mask_threshold)
            x = x + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
            return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, of_layer(drawn, 1)), density

        # Without numbers for drop-path the model is not in training.
        operation = self._operation(places) if drawn is None else None
        if operation is None:
            x, density = by_layers(x)
            return (x if then is None else then(x)), density
        needs = {"then": then, "needed_tokens": needed_tokens}
        out = operation(x, self._weights(), **needs, otherwise=lambda x: by_layers(x)[0])
        return out, jnp.zeros((), jnp.float32)

    def _operation(self, places: Places) -> Callable[..., jax.Array] | None:
        """The attention kind's operation for a whole block at inference, if there is one and the block has no more."""
        if not isinstance(self.attn, MultiHeadAttention) or places.kept is not None:
            return None
        core = self.attn.core
        if core.kind.block is None or core.implementation == "xla" or core.pools_qkv:
            return None
        where = where_taps_stand(self.attn.token_kernel, places.grid, places.prefix_tokens)
        options = {"num_heads": self.attn.num_heads, "epsilon": self.norm1.epsilon}
        return functools.partial(core.kind.block, implementation=core.implementation, **options, **where)

    def _weights(self) -> BlockWeights:
        attn, mlp = self.attn, self.mlp
        layers = {"qkv": attn.qkv, "proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
        arrays = {f"{name}_kernel": layer.kernel for name, layer in layers.items()}
        arrays |= {f"{name}_bias": layer.bias for name, layer in layers.items()}
        for name, norm in {"norm1": self.norm1, "norm2": self.norm2}.items():
            arrays |= {f"{name}_scale": norm.scale, f"{name}_bias": norm.bias}
        arrays["token_kernel"] = attn.token_kernel
        values: dict[str, Any] = {name: None if array is None else array[...] for name, array in arrays.items()}
        return BlockWeights(**values)


class DeiT(Backbone):
    """DeiT; `distilled` adds the distillation token and its head, whose logits are averaged with the class head's.

    The model also takes images of other sizes than `image_size`: it resizes the position embedding to their grid.

    Raises:
      InputError: image_size is not a multiple of patch_size, the heads do not divide the width, qkv_pool is unknown, or
        qkv_pool is set and the attention kind replaces multi-head attention.
    """

    takes_modules: ClassVar[bool] = True

    def __init__(self, config: DeiTConfig, core: Core, layers: Layers):
        layers = dataclasses.replace(layers, init_std=config.init_std)
        dim, depth, classes = config.embed_dim, config.depth, config.num_classes
        self.patch_size = config.patch_size
        self.remat = config.remat
        self.in_chans = config.in_chans
        self.grid = patch_grid(image_shape(config.image_size), config.patch_size, "the patch")
        self.prefix_tokens = 2 if config.distilled else 1
        self.patch_embed = PatchEmbed(config, layers)
        self.cls_token = layers.embedding(1, 1, dim)
        self.dist_token = layers.embedding(1, 1, dim) if config.distilled else None
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.fixed_positions = config.fixed_positions
        if config.fixed_positions:
            positions = sincos_position_embedding(self.grid, dim, self.prefix_tokens)
            self.pos_embed = nnx.Param(jnp.asarray(positions, layers.param_dtype))
        else:
            self.pos_embed = layers.embedding(1, tokens, dim)
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]  # linear over depth
        if config.qkv_pool is not None:
            check_known("qkv_pool", config.qkv_pool, QKV_POOLS)
            if core.kind.module is not None:
                raise InputError(f"qkv_pool is for multi-head attention, which attention={core.kind.name!r} is not.")
            core = dataclasses.replace(core, pools_qkv=True)
        # A core for each block, because windows shift in every second block.
        cores = [dataclasses.replace(core, window_size=config.window_size, block=i) for i in range(depth)]
        self.blocks = nnx.List(
            Block(config, core, layers, drop_path_rate=rate) for core, rate in zip(cores, rates, strict=True)
        )
        check_known("global_pool", config.global_pool, GLOBAL_POOLS)
        averages = config.global_pool == "avg"
        if averages and config.distilled:
            raise InputError("global_pool='avg' has one head, and distilled=True needs two.")
        self.norm = None if averages else layers.layer_norm(dim)
        self.fc_norm = layers.layer_norm(dim) if averages and classes else None
        self.head: Any = layers.linear(dim, classes) if classes else None
        self.head_dist = layers.linear(dim, classes) if classes and config.distilled else None
        self.feature_strides = (config.patch_size,)
        self.feature_channels = (dim,)

    def _encode(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None, *, for_maps: bool
    ) -> tuple[tuple[jax.Array, tuple[int, int]], jax.Array]:
        """((tokens after the last norm, prefix first; the patches' grid), mask densities)."""
        x, grid = self.embed(images)
        needed = None if for_maps or self.fc_norm is not None else self.prefix_tokens
        x, densities = self.transform(x, Places(grid, self.prefix_tokens), mask_threshold, key, needed_tokens=needed)
        return (x, grid), densities

    def embed(
        self, images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch tokens embed_dim"], tuple[int, int]]:
        """The tokens with their positions, prefix first, and the patches' grid."""
        grid = patch_grid(images.shape[1:3], self.patch_size, "the patch")
        tokens = self.patch_embed(images)
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        prefix = [jnp.broadcast_to(token, (images.shape[0], *token.shape[1:])).astype(tokens.dtype) for token in prefix]
        # The cast to the compute dtype comes after resizing, so that the positions are rounded once.
        embedding = jax.lax.stop_gradient(self.pos_embed[...]) if self.fixed_positions else self.pos_embed[...]
        positions = resize_position_embedding(embedding, self.grid, grid, self.prefix_tokens)
        return jnp.concatenate([*prefix, tokens], axis=1) + positions.astype(tokens.dtype), grid

    def transform(
        self,
        x: Float[Array, "batch tokens embed_dim"],
        places: Places,
        mask_threshold: ArrayLike | None,
        key: Key[Array, ""] | None,
        *,
        needed_tokens: int | None = None,
    ) -> tuple[Float[Array, "batch result_tokens embed_dim"], Float[Array, "layers"]]:
        """All blocks and the last norm.

        Args:
          x: tokens from `embed`, prefix first.
          places: where the tokens stand.
          mask_threshold: as in `training_outputs`.
          key: as in `training_outputs`.
          needed_tokens: how many leading tokens of the result are needed; None means all.

        Returns:
          The tokens, at least those that are needed, and the mask density of each layer.
        """
        # A Python loop, not a scan over stacked blocks: each block keeps its parameters under a name of its own, as in
        # timm's checkpoints, and blocks may differ.
        drawn = draw_drop_path(key, len(self.blocks), x.shape[0])
        densities = []
        # The last norm is of all tokens that the last block returns, though a classifier reads one or two. If the
        # layers' result were cut, XLA would no longer compute any block's means together with the product before: by
        # its estimate a DeiT-S at 896 pixels, whose blocks are not one kernel, would take a fifth longer on a TPU.
        last = {"then": self.norm, "needed_tokens": needed_tokens}
        for i, block in enumerate(self.blocks):
            x, density = run_block(
                block,
                x,
                remat=self.remat,
                places=places,
                mask_threshold=mask_threshold,
                drawn=of_layer(drawn, i),
                **(last if i + 1 == len(self.blocks) else {}),
            )
            densities.append(density)
        return x, jnp.stack(densities)

    def _classify(self, encoded, densities, *, training):
        x, _ = encoded
        with jax.named_scope("head"):
            # Each head reads its own prefix token. `results` averages their logits, as timm does.
            logits = [self.head(x[:, 0] if self.fc_norm is None else self.fc_norm(x[:, 1:].mean(axis=1)))]
            if self.head_dist is not None:
                logits.append(self.head_dist(x[:, 1]))
        return jnp.stack(logits).astype(jnp.float32), densities

    def _maps(self, encoded, densities):
        x, grid = encoded
        return [x[:, self.prefix_tokens :].reshape(x.shape[0], *grid, x.shape[2])], densities
