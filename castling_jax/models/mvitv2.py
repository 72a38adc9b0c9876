"""MViTv2, the improved multiscale vision transformer (Li et al., CVPR 2022), with any of the four attentions."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError
from castling_jax.models.attention import attend, new_token_kernel
from castling_jax.models.backbone import Backbone
from castling_jax.models.layers import (
    TORCH_INIT,
    Mlp,
    draw_drop_path,
    drop_path,
    layer_norm,
    linear,
    mlp_width,
    norm_heads,
    normal_parameter,
    of_layer,
    run_block,
    split_linear,
    stop_at_zero,
)
from castling_jax.models.position import resize_relative_positions
from castling_jax.ops.tokens import select_tokens

Pair = tuple[int, int]  # (height, width)
PATCH_KERNEL, PATCH_STRIDE = 7, 4


class PatchEmbed(nnx.Module):
    """Overlapping patches, each projected to a token; an edge that is no multiple of the stride is padded."""

    def __init__(self, in_chans: int, embed_dim: int, **common: Any):
        self.proj = nnx.Conv(
            in_chans,
            embed_dim,
            (PATCH_KERNEL, PATCH_KERNEL),
            strides=PATCH_STRIDE,
            padding=PATCH_KERNEL // 2,
            kernel_init=TORCH_INIT,
            **common,
        )

    @jax.named_scope("patch_embed")
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns dim"]:
        return self.proj(images)


class Pool(nnx.Module):
    """Pooling by a depthwise 3 x 3 convolution without bias, whose taps all heads share."""

    def __init__(self, head_dim: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(TORCH_INIT(rngs.params(), (3, 3, 1, head_dim), param_dtype))

    @jax.named_scope("pool")
    def __call__(
        self, x: Float[Array, "batch height width channels"], strides: Pair
    ) -> Float[Array, "batch rows columns channels"]:
        # The taps are repeated for every head, so that heads stay side by side in the channels and nothing is
        # transposed. A convolution, since XLA has depthwise ones for TPUs: by its estimates shifted multiply-adds
        # would take two to three times as long forwards and four to five backwards. On a CPU they would be faster.
        channels = x.shape[3]
        kernel = jnp.tile(self.kernel[...].astype(x.dtype), channels // self.kernel.shape[3])
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )


class MultiScaleAttention(nnx.Module):
    """Pooling attention: queries, keys and values are pooled on the grid, each with its own stride.

    The qkv projection's rows are ordered q, k, v, then head, then head_dim. The relative positions are part of the
    scores alone: softmax models hold them beside qkv, castling models in `softmax_branch`, which goes at the switch,
    and the other kinds have none. Residual pooling, the pooled queries added to the output, is no part of the softmax
    and stays in all of them.

    Args:
      dim: width of the input.
      dim_out: width of the output, a multiple of num_heads.
      num_heads: heads.
      grid: (height, width) in tokens that the relative positions are made for.
      stride_q: of the queries' pooling.
      stride_kv: of the keys' and the values' pooling.
      common: dtype, param_dtype and rngs.
      The rest is as in `Attention`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        grid: Pair,
        stride_q: Pair,
        stride_kv: Pair,
        *,
        attention: str,
        form: str,
        qkv_bias: bool,
        token_conv: str | None,
        token_kernel_size: int | None,
        implementation: str,
        common: dict[str, Any],
    ):
        head_dim, rngs, param_dtype = dim_out // num_heads, common["rngs"], common["param_dtype"]
        self.num_heads = num_heads
        self.attention = attention
        self.form = form
        self.implementation = implementation
        self.stride_q = stride_q
        self.stride_kv = stride_kv
        self.qkv = linear(dim, 3 * dim_out, use_bias=qkv_bias, **common)
        self.proj = linear(dim_out, dim_out, **common)
        self.pool_q, self.pool_k, self.pool_v = (Pool(head_dim, param_dtype=param_dtype, rngs=rngs) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_v = (layer_norm(head_dim, **common) for _ in range(3))
        self.token_kernel = new_token_kernel(attention, token_conv, token_kernel_size, num_heads, param_dtype)
        q_grid, kv_grid = pooled(grid, stride_q), pooled(grid, stride_kv)
        # Drawn in every kind and form, so that with one seed all else starts alike.
        rel_pos_h, rel_pos_w = (
            normal_parameter(rngs, (2 * max(sides) - 1, head_dim), param_dtype)
            for sides in zip(q_grid, kv_grid, strict=True)
        )
        if attention == "softmax":
            self.rel_pos_h, self.rel_pos_w = rel_pos_h, rel_pos_w
        self.softmax_branch = (
            nnx.Dict(rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w) if (attention, form) == ("castling", "train") else None
        )

    def __call__(
        self, x: Float[Array, "batch height width dim"], *, mask_threshold: ArrayLike | None
    ) -> tuple[Float[Array, "batch rows columns dim_out"], Float[Array, ""]]:
        """The attention's output on the queries' grid, and the mask density: 0 without the branch."""
        with jax.named_scope("qkv"):
            q, k, v = split_linear(self.qkv, x, 3)
        q_grid, kv_grid = (pooled(x.shape[1:3], stride) for stride in (self.stride_q, self.stride_kv))
        q = self._tokens(self.norm_q, self.pool_q(q, self.stride_q))
        k = self._tokens(self.norm_k, self.pool_k(k, self.stride_kv))
        # Where queries and keys are pooled differently, the 1/2 V term and the token kernel need values at the
        # queries' tokens, of which the paper does not speak. Ours are the same values pooled in the same way, by
        # pool_v and norm_v, at the queries' stride: where the two grids have a token in common its value is v's own,
        # no parameter is added that the softmax model lacks, and with equal strides they are v itself.
        query_values = None
        if self.attention != "softmax" and self.stride_q != self.stride_kv:
            query_values = self._tokens(self.norm_v, self.pool_v(v, self.stride_q))
        out, density = attend(
            q,
            k,
            self._tokens(self.norm_v, self.pool_v(v, self.stride_kv)),
            None if self.token_kernel is None else self.token_kernel[...],
            attention=self.attention,
            form=self.form,
            mask_threshold=mask_threshold,
            bias=self._bias(q, q_grid, kv_grid),
            query_values=query_values,
            grid=q_grid,
            implementation=self.implementation,
        )
        with jax.named_scope("proj"):
            return self.proj((out + q).reshape(x.shape[0], *q_grid, -1)), density

    def _tokens(
        self, norm: nnx.LayerNorm, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens heads head_dim"]:
        return norm_heads(norm, x.reshape(x.shape[0], -1, x.shape[3]), self.num_heads)

    def _bias(self, q: jax.Array, q_grid: Pair, kv_grid: Pair) -> tuple[jax.Array, jax.Array] | None:
        tables: Any = self if self.attention == "softmax" else self.softmax_branch
        if tables is None:
            return None
        return decomposed_bias(q, tables.rel_pos_h[...], tables.rel_pos_w[...], q_grid, kv_grid)


@jax.named_scope("relative_positions")
def decomposed_bias(
    q: Float[Array, "batch queries heads head_dim"],
    rel_pos_h: Float[Array, "row_distances head_dim"],
    rel_pos_w: Float[Array, "column_distances head_dim"],
    q_grid: Pair,
    kv_grid: Pair,
) -> tuple[Float[Array, "batch heads queries key_rows"], Float[Array, "batch heads queries key_columns"]]:
    """The relative positions' part of the scores (MViTv2, section 4.1), as the two factors of its outer sum.

    Of a query at (y, x) and a key at (row, column): q . R_h[y - row] + q . R_w[x - column], with q as it is, unscaled.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)  # as the scores themselves
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
    """One axis of the grid: the table's entry for each query and key, resized where it is of another grid's length.

    The shorter side is spread over the longer one's steps. That is done in integers, where the published code has
    floating-point ratios that may round a whole number down.
    """
    longer = max(queries, keys)
    table = resize_relative_positions(table, 2 * longer - 1)
    query_steps = np.arange(queries) * longer // queries
    key_steps = (keys - 1 - np.arange(keys)) * longer // keys
    distances = query_steps[:, None] + key_steps[None]
    return select_tokens(table[None], distances.ravel()).reshape(queries, keys, -1)


def pooled(grid: tuple[int, ...], stride: Pair) -> Pair:
    """The grid after pooling; an edge that is no multiple of the stride is padded."""
    height, width = grid
    return -(-height // stride[0]), -(-width // stride[1])


def max_pool(
    x: Float[Array, "batch height width channels"], stride: Pair
) -> Float[Array, "batch rows columns channels"]:
    """The skip path's pooling: the maximum over one token more than the stride, on the grid of the queries."""
    if stride == (1, 1):
        return x  # a window of one token, of whose gradient the TPU's compiler makes a search all the same
    window = tuple(step + 1 if step > 1 else 1 for step in stride)
    padding = tuple(((step + 1) // 2, step // 2) if step > 1 else (0, 0) for step in stride)
    return nnx.max_pool(x, window, stride, padding)


class Block(nnx.Module):
    """A pre-norm block; where the width changes, attention changes it, and the skip path projects the normed input."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        stride_q: Pair,
        mlp_ratio: float,
        drop_path_rate: float,
        common: dict[str, Any],
        **attention: Any,
    ):
        self.drop_path_rate = drop_path_rate
        self.stride_q = stride_q
        self.norm1 = layer_norm(dim, **common)
        self.shortcut_proj_attn = linear(dim, dim_out, **common) if dim != dim_out else None
        self.attn = MultiScaleAttention(dim, dim_out, stride_q=stride_q, common=common, **attention)
        self.norm2 = layer_norm(dim_out, **common)
        self.mlp = Mlp(dim_out, mlp_width(dim_out, mlp_ratio), **common)

    def __call__(self, x, *, mask_threshold, drawn):
        normed = self.norm1(stop_at_zero(x))
        with jax.named_scope("shortcut"):
            skip = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
        attended, density = self.attn(normed, mask_threshold=mask_threshold)
        x = max_pool(skip, self.stride_q) + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
        return x + drop_path(self.mlp(self.norm2(stop_at_zero(x))), self.drop_path_rate, of_layer(drawn, 1)), density


class Stage(nnx.Module):
    """Blocks of one width and grid, which the first of them makes."""

    def __init__(self, blocks: list[Block]):
        self.blocks = nnx.List(blocks)


class Head(nnx.Module):
    """The classifier, under timm's name."""

    def __init__(self, embed_dim: int, num_classes: int, **common: Any):
        self.fc = linear(embed_dim, num_classes, **common)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        return self.fc(x)


class MViTv2(Backbone):
    """MViTv2 without a class token: width and heads double from stage to stage, the mean token is classified.

    `embed_dim` and `num_heads` are the first stage's. `stride_q` is the (height, width) stride of the queries in each
    stage's first block; None is 1 in the first stage and 2 in the others. `stride_kv_adaptive` is the stride of keys
    and values, divided by the queries' from stage to stage. Images of any size are taken: every grid follows, and
    relative positions are resized to it.

    Raises:
      InputError: depths, strides or heads are not what they have to be, or an even kernel.
    """

    def __init__(
        self,
        *,
        attention: str,
        form: str,
        num_classes: int,
        image_size: int,
        embed_dim: int = 96,
        depths: tuple[int, ...],
        num_heads: int = 1,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        stride_q: tuple[Pair, ...] | None = None,
        stride_kv_adaptive: Pair = (4, 4),
        drop_path_rate: float = 0.0,
        remat: bool = False,
        token_conv: str | None = "2d",
        token_kernel_size: int | None = None,
        implementation: str = "auto",
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if not isinstance(depths, tuple) or not depths or any(type(n) is not int or n < 1 for n in depths):
            raise InputError(f"depths must be a list of at least 1 block for each stage, not {depths!r}.")
        strides = ((1, 1), *((2, 2),) * (len(depths) - 1)) if stride_q is None else stride_q
        if not isinstance(strides, tuple) or len(strides) != len(depths) or not all(map(_is_pair, strides)):
            raise InputError(
                f"stride_q must be a pair of positive numbers for each of {len(depths)} stages, not {strides!r}."
            )
        if not _is_pair(stride_kv_adaptive):
            raise InputError(f"stride_kv_adaptive must be a pair of positive numbers, not {stride_kv_adaptive!r}.")
        if embed_dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide the width {embed_dim}.")
        self.in_chans = in_chans
        self.remat = remat
        self.patch_embed = PatchEmbed(in_chans, embed_dim, **common)
        grid, width, stride_kv = (
            pooled((image_size, image_size), (PATCH_STRIDE, PATCH_STRIDE)),
            embed_dim,
            stride_kv_adaptive,
        )
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in itertools.count())  # linear over depth
        stages = []
        for i, (depth, stage_stride) in enumerate(zip(depths, strides, strict=True)):
            if min(stage_stride) > 1:
                stride_kv = (max(stride_kv[0] // stage_stride[0], 1), max(stride_kv[1] // stage_stride[1], 1))
            blocks = []
            for j in range(depth):
                block_stride = stage_stride if j == 0 else (1, 1)
                blocks.append(
                    Block(
                        width,
                        embed_dim * 2**i,
                        num_heads=num_heads * 2**i,
                        grid=grid,
                        stride_q=block_stride,
                        stride_kv=stride_kv,
                        mlp_ratio=mlp_ratio,
                        drop_path_rate=next(rates),
                        attention=attention,
                        form=form,
                        qkv_bias=qkv_bias,
                        token_conv=token_conv,
                        token_kernel_size=token_kernel_size,
                        implementation=implementation,
                        common=common,
                    )
                )
                grid, width = pooled(grid, block_stride), embed_dim * 2**i
            stages.append(Stage(blocks))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(width, **common)
        self.head = Head(width, num_classes, **common)

    def head_logits(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "1 batch classes"], Float[Array, "layers"]]:
        """Logits in float32 and the mask density of each layer; with a key, drop-path is on, as in training.

        Raises:
          InputError: the image is empty or has other channels, or a castling model in training form has no threshold.
        """
        features, densities = self._run(images, mask_threshold, key)
        logits = self.head(jnp.mean(self.norm(features[-1]), axis=(1, 2)))
        return logits.astype(jnp.float32)[None], jnp.stack(densities)

    def features(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "batch height width channels"]]:
        """Each stage's output, finest first: what a detector reads. The last one is not yet normed.

        Raises:
          InputError: as a call does.
        """
        return self._run(images, mask_threshold, key)[0]

    def _run(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """(the stages' outputs, the layers' densities)."""
        if images.shape[3] != self.in_chans:
            raise InputError(f"images must have {self.in_chans} channels, not {images.shape[3]}.")
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


def _is_pair(stride: Any) -> bool:
    return isinstance(stride, tuple) and len(stride) == 2 and all(isinstance(step, int) and step > 0 for step in stride)
