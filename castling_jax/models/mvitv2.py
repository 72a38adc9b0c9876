"""MViTv2, the improved multiscale vision transformer (Li et al., CVPR 2022), with any kind of attention."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.errors import InputError, check
from castling_jax.models.attention.core import Core
from castling_jax.models.attention.heads import check_heads_divide
from castling_jax.models.backbone import Backbone, BackboneConfig
from castling_jax.models.layers import (
    TORCH_INIT,
    Layers,
    Mlp,
    Pool,
    check_stages,
    draw_drop_path,
    drop_path,
    norm_heads,
    of_layer,
    run_block,
    split_linear,
    stop_at_zero,
    torch_bias_init,
)
from castling_jax.models.position import resize_relative_positions
from castling_jax.ops.tokens import select_tokens
from castling_jax.sizes import image_shape

Pair = tuple[int, int]  # (height, width)
PATCH_KERNEL, PATCH_STRIDE = 7, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MViTv2Config(BackboneConfig):
    """MViTv2's constructor arguments.

    Attributes:
      embed_dim: width of the first stage; it doubles from stage to stage.
      depths: number of blocks in each stage.
      num_heads: number of heads in the first stage; it doubles from stage to stage.
      qkv_bias: whether the projections to q, k and v have a bias.
      stride_q: (height, width) stride of the queries in each stage's first block; None is 1 in the first stage and 2 in
        the others.
      stride_kv_adaptive: (height, width) stride of keys and values in the first stage; each later stage divides it by
        the stride of its queries.
    """

    embed_dim: int = 96
    depths: tuple[int, ...]
    num_heads: int = 1
    qkv_bias: bool = True
    stride_q: tuple[Pair, ...] | None = None
    stride_kv_adaptive: Pair = (4, 4)


@dataclasses.dataclass(frozen=True)
class Pooling:
    """The grid of a block's input, the stride of its queries, and the stride of its keys and values."""

    grid: Pair
    stride_q: Pair
    stride_kv: Pair


class PatchEmbed(nnx.Module):
    """Overlapping patches, each projected to a token; a side that is not a multiple of the stride is padded."""

    def __init__(self, config: MViTv2Config, layers: Layers):
        self.proj = nnx.Conv(
            config.in_chans,
            config.embed_dim,
            (PATCH_KERNEL, PATCH_KERNEL),
            strides=PATCH_STRIDE,
            padding=PATCH_KERNEL // 2,
            kernel_init=TORCH_INIT,
            bias_init=torch_bias_init(config.in_chans * PATCH_KERNEL**2),
            **layers.flax,
        )

    @jax.named_scope("patch_embed")
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns dim"]:
        return self.proj(images)


class MultiScaleAttention(nnx.Module):
    """Pooling attention: queries, keys and values are pooled on the grid, each with its own stride.

    The qkv projection's rows are ordered q, k, v, then head, then head_dim. The relative positions only enter the
    scores: softmax models hold them beside qkv, castling models in `softmax_branch`, which the switch drops, and kinds
    without a bias of the scores have none. Residual pooling adds the pooled queries to the output. It is not part of
    the softmax, so every kind has it.

    Args:
      dim: width of the input.
      dim_out: width of the output, a multiple of num_heads.
      num_heads: heads.
      pooling: the input's grid, for which the relative positions are made, and the strides.
      core: the attention between the projections.
      layers: makes the layers.
      qkv_bias: whether the qkv projection has a bias.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        pooling: Pooling,
        core: Core,
        layers: Layers,
        *,
        qkv_bias: bool,
    ):
        head_dim = dim_out // num_heads
        self.num_heads, self.key_dim, self.value_dim = num_heads, head_dim, head_dim
        self.core = core
        self.stride_q = pooling.stride_q
        self.stride_kv = pooling.stride_kv
        self.qkv = layers.linear(dim, 3 * dim_out, use_bias=qkv_bias)
        self.proj = layers.linear(dim_out, dim_out)
        self.pool_q, self.pool_k, self.pool_v = (Pool(head_dim, layers) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_v = (layers.layer_norm(head_dim) for _ in range(3))
        q_grid, kv_grid = pooled(pooling.grid, pooling.stride_q), pooled(pooling.grid, pooling.stride_kv)
        # Drawn in every kind and form, so that with the same seed all other parameters start with the same numbers.
        rel_pos_h, rel_pos_w = (
            layers.embedding(2 * max(sides) - 1, head_dim) for sides in zip(q_grid, kv_grid, strict=True)
        )
        core.add_parameters(self, layers, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)

    def __call__(
        self, x: Float[Array, "batch height width dim"], *, mask_threshold: ArrayLike | None
    ) -> tuple[Float[Array, "batch rows columns dim_out"], Float[Array, ""]]:
        """The attention's output on the queries' grid, and the mask density: 0 without the branch."""
        with jax.named_scope("qkv"):
            q, k, v = split_linear(self.qkv, x, 3)
        q_grid, kv_grid = (pooled(x.shape[1:3], stride) for stride in (self.stride_q, self.stride_kv))
        q = self._tokens(self.norm_q, self.pool_q(q, self.stride_q))
        k = self._tokens(self.norm_k, self.pool_k(k, self.stride_kv))
        # Where queries and keys are pooled differently, the 1/2 V term and the token kernel need values at the queries'
        # tokens. The paper does not define them. Here pool_v and norm_v pool the same values at the queries' stride: a
        # token that both grids share keeps its value in v, no parameter is new to the softmax model, and with equal
        # strides these values are v itself.
        query_values = None
        if self.core.needs_query_values and self.stride_q != self.stride_kv:
            query_values = self._tokens(self.norm_v, self.pool_v(v, self.stride_q))
        v = self._tokens(self.norm_v, self.pool_v(v, self.stride_kv))
        # The bias reads the queries before any scaling or normalisation by the kind, as in MViTv2.
        bias = None
        if (tables := self.core.tables_of(self)) is not None:
            bias = decomposed_bias(q, tables.rel_pos_h[...], tables.rel_pos_w[...], q_grid, kv_grid)
        out, density = self.core.kind(
            q,
            k,
            v,
            mask_threshold=mask_threshold,
            bias=bias,
            query_values=query_values,
            grid=q_grid,
            **self.core.inputs_of(self),
        )
        with jax.named_scope("proj"):
            return self.proj((out + q).reshape(x.shape[0], *q_grid, -1)), density

    def _tokens(
        self, norm: nnx.LayerNorm, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens heads head_dim"]:
        return norm_heads(norm, x.reshape(x.shape[0], -1, x.shape[3]), self.num_heads)


@jax.named_scope("relative_positions")
def decomposed_bias(
    q: Float[Array, "batch queries heads head_dim"],
    rel_pos_h: Float[Array, "row_distances head_dim"],
    rel_pos_w: Float[Array, "column_distances head_dim"],
    q_grid: Pair,
    kv_grid: Pair,
) -> tuple[Float[Array, "batch heads queries key_rows"], Float[Array, "batch heads queries key_columns"]]:
    """The relative positions' part of the scores (MViTv2, section 4.1), as the two factors of an outer sum.

    For a query at (y, x) and a key at (row, column) it is q . R_h[y - row] + q . R_w[x - column], with unscaled q.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)  # the scores' dtype
    batch, queries, heads, head_dim = q.shape
    on_grid = q.reshape(batch, *q_grid, heads, head_dim).astype(wide)
    rows = relative_positions(rel_pos_h, q_grid[0], kv_grid[0]).astype(wide)
    columns = relative_positions(rel_pos_w, q_grid[1], kv_grid[1]).astype(wide)
    return (
        jnp.einsum("byxhd,ykd->bhyxk", on_grid, rows).reshape(batch, heads, queries, -1),
        jnp.einsum("byxhd,xkd->bhyxk", on_grid, columns).reshape(batch, heads, queries, -1),
    )


def relative_positions(
    table: Float[Array, "distances head_dim"], queries: int, keys: int
) -> Float[Array, "queries keys head_dim"]:
    """The table's entry for each query and key along one axis; a table for another length of the axis is resized.

    The positions on the shorter side are spread over the steps of the longer side. The arithmetic is in integers: the
    published code computes with floating-point ratios, which may round a whole number down.
    """
    longer = max(queries, keys)
    table = resize_relative_positions(table, 2 * longer - 1)
    # (2 longer - 1) distances, from the farthest key behind a query to the farthest key ahead of it.
    query_steps = np.arange(queries) * longer // queries
    key_steps = (keys - 1 - np.arange(keys)) * longer // keys
    distances = query_steps[:, None] + key_steps[None]
    return select_tokens(table[None], distances.ravel()).reshape(queries, keys, -1)


def pooled(grid: tuple[int, ...], stride: Pair) -> Pair:
    """The grid after pooling; a side that is not a multiple of the stride is padded."""
    height, width = grid
    return -(-height // stride[0]), -(-width // stride[1])


def max_pool(
    x: Float[Array, "batch height width channels"], stride: Pair
) -> Float[Array, "batch rows columns channels"]:
    """The skip path's pooling onto the queries' grid: a maximum over windows one token larger than the stride."""
    if stride == (1, 1):
        return x  # the window is one token, but XLA:TPU would make its gradient a search
    window = tuple(step + 1 if step > 1 else 1 for step in stride)
    padding = tuple(((step + 1) // 2, step // 2) if step > 1 else (0, 0) for step in stride)
    return nnx.max_pool(x, window, stride, padding)


class Block(nnx.Module):
    """A pre-norm block. Where the width changes, attention changes it, and so does a projection on the skip path."""

    def __init__(
        self,
        config: MViTv2Config,
        dim: int,
        stage: int,
        pooling: Pooling,
        core: Core,
        layers: Layers,
        *,
        drop_path_rate: float,
    ):
        dim_out, num_heads = config.embed_dim * 2**stage, config.num_heads * 2**stage
        self.drop_path_rate = drop_path_rate
        self.stride_q = pooling.stride_q
        self.norm1 = layers.layer_norm(dim)
        self.shortcut_proj_attn = layers.linear(dim, dim_out) if dim != dim_out else None
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, pooling, core, layers, qkv_bias=config.qkv_bias)
        self.norm2 = layers.layer_norm(dim_out)
        self.mlp = Mlp(dim_out, config.mlp_ratio, layers)

    def __call__(self, x, *, drawn, **inputs):
        normed = self.norm1(stop_at_zero(x))
        # The projection reads the normed input, as in MViTv2; a skip path without a projection adds the raw input.
        with jax.named_scope("shortcut"):
            skip = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
        attended, density = self.attn(normed, **inputs)
        x = max_pool(skip, self.stride_q) + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
        return x + drop_path(self.mlp(self.norm2(stop_at_zero(x))), self.drop_path_rate, of_layer(drawn, 1)), density


class Stage(nnx.Module):
    """Blocks with the same width and grid, to which the first block changes its input."""

    def __init__(self, blocks: list[Block]):
        self.blocks = nnx.List(blocks)


class Head(nnx.Module):
    """The classifier, under timm's name."""

    def __init__(self, fc: nnx.Linear):
        self.fc = fc

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        return self.fc(x)


class MViTv2(Backbone):
    """MViTv2 without a class token: width and heads double from stage to stage, and the head reads the mean token.

    The model takes images of any size: the grids follow from it, and relative positions are resized to the grids.

    Raises:
      InputError: depths or strides have a wrong form, or the heads do not divide the width.
    """

    def __init__(self, config: MViTv2Config, core: Core, layers: Layers):
        depths, width, stride_kv = config.depths, config.embed_dim, config.stride_kv_adaptive
        strides = _stage_strides(config)
        check_heads_divide(width, config.num_heads)
        self.in_chans = config.in_chans
        self.remat = config.remat
        self.patch_embed = PatchEmbed(config, layers)
        grid = pooled(image_shape(config.image_size), (PATCH_STRIDE, PATCH_STRIDE))
        rates = (config.drop_path_rate * i / max(sum(depths) - 1, 1) for i in itertools.count())  # linear over depth
        stages = []
        for stage, (depth, stage_stride) in enumerate(zip(depths, strides, strict=True)):
            # Keys and values shrink less where the queries' grid shrinks, so that their own grid stays the same.
            if min(stage_stride) > 1:
                stride_kv = (max(stride_kv[0] // stage_stride[0], 1), max(stride_kv[1] // stage_stride[1], 1))
            blocks = []
            for stride_q in [stage_stride] + [(1, 1)] * (depth - 1):
                pooling = Pooling(grid, stride_q, stride_kv)
                blocks.append(Block(config, width, stage, pooling, core, layers, drop_path_rate=next(rates)))
                # After the block, whose `width` is that of its input: only a stage's first block changes it.
                grid, width = pooled(grid, stride_q), config.embed_dim * 2**stage
            stages.append(Stage(blocks))
        self.stages = nnx.List(stages)
        classes = config.num_classes
        self.norm: Any = layers.layer_norm(width) if classes else None  # the feature maps are taken before this norm
        self.head: Any = Head(layers.linear(width, classes)) if classes else None
        sides = itertools.accumulate(strides, lambda one, other: (one[0] * other[0], one[1] * other[1]))
        scaled = [(PATCH_STRIDE * height, PATCH_STRIDE * width) for height, width in sides]
        self.feature_strides = tuple(height if height == width else (height, width) for height, width in scaled)
        self.feature_channels = tuple(config.embed_dim * 2**stage for stage in range(len(depths)))

    def _encode(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None, *, for_maps: bool
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """(outputs of the stages, mask densities of the layers)."""
        if min(images.shape[1:3]) < 1:
            raise InputError(f"an image of {images.shape[1]} x {images.shape[2]} pixels is empty: give at least 1 x 1.")
        x = self.patch_embed(images)
        drawn = draw_drop_path(key, sum(len(stage.blocks) for stage in self.stages), x.shape[0])
        features: list[jax.Array] = []
        densities: list[jax.Array] = []
        for stage in self.stages:
            for block in stage.blocks:
                of_block = of_layer(drawn, len(densities))
                x, density = run_block(block, x, remat=self.remat, mask_threshold=mask_threshold, drawn=of_block)
                densities.append(density)
            features.append(x)
        return features, densities

    def _classify(self, encoded, densities, *, training):
        logits = self.head(jnp.mean(self.norm(encoded[-1]), axis=(1, 2)))
        return logits.astype(jnp.float32)[None], jnp.stack(densities)

    def _maps(self, encoded, densities):
        return encoded, jnp.stack(densities)


def _stage_strides(config: MViTv2Config) -> tuple[Pair, ...]:
    """The queries' stride in each stage's first block.

    Raises:
      InputError: depths or strides have a wrong form.
    """
    depths = config.depths
    check_stages(depths=depths)
    default = ((1, 1), *((2, 2),) * (len(depths) - 1))
    strides = default if config.stride_q is None else config.stride_q
    check(
        isinstance(strides, tuple) and len(strides) == len(depths) and all(map(_is_pair, strides)),
        f"stride_q must be a pair of positive numbers for each of {len(depths)} stages, not {strides!r}.",
    )
    if not _is_pair(config.stride_kv_adaptive):
        raise InputError(f"stride_kv_adaptive must be a pair of positive numbers, not {config.stride_kv_adaptive!r}.")
    return strides


def _is_pair(stride: Any) -> bool:
    return isinstance(stride, tuple) and len(stride) == 2 and all(isinstance(step, int) and step > 0 for step in stride)
