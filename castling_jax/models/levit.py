"""LeViT (Graham et al., ICCV 2021) with any of the four attentions: a convolutional stem, then three shrinking grids.

Batch norm follows every linear layer and convolution; at inference it is folded into them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, Key

from castling_jax.errors import InputError
from castling_jax.models.attention import attend, new_token_kernel
from castling_jax.models.backbone import Backbone
from castling_jax.models.layers import (
    ConvNorm,
    LinearNorm,
    NormLinear,
    draw_drop_path,
    drop_path,
    mlp_width,
    of_layer,
    run_block,
)
from castling_jax.ops.tokens import select_tokens

STEM_STRIDE = 16
# Value channels a key channel, and the MLP's ratio where the grid shrinks, whatever mlp_ratio is (as in timm).
VALUE_RATIO, SUBSAMPLING_VALUE_RATIO = 2, 4
SUBSAMPLING_MLP_RATIO = 2


class Stem(nnx.Module):
    """Four convolutions of stride 2 with Hardswish between them."""

    def __init__(self, in_chans: int, dim: int, **layer: Any):
        self.conv1 = ConvNorm(in_chans, dim // 8, **layer)
        self.conv2 = ConvNorm(dim // 8, dim // 4, **layer)
        self.conv3 = ConvNorm(dim // 4, dim // 2, **layer)
        self.conv4 = ConvNorm(dim // 2, dim, **layer)

    @jax.named_scope("stem")
    def __call__(self, x, *, training):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.hard_swish(conv(x, training=training))
        return self.conv4(x, training=training)


class Projection(nnx.Module):
    """Hardswish, then a batch-normed linear layer."""

    def __init__(self, dim: int, out_dim: int, **layer: Any):
        self.ln = LinearNorm(dim, out_dim, **layer)

    @jax.named_scope("proj")
    def __call__(self, x, *, training):
        return self.ln(jax.nn.hard_swish(x), training=training)


class Queries(nnx.Module):
    """The queries of a subsampling attention: every second token of every second row, then a batch-normed layer."""

    def __init__(self, dim: int, out_dim: int, **layer: Any):
        self.ln = LinearNorm(dim, out_dim, **layer)

    def __call__(self, x, *, grid, training):
        return self.ln(select_tokens(x, every_second(grid)), training=training)


class LevitAttention(nnx.Module):
    """LeViT's attention; a subsampling one gives its output on the grid of half the height and width, rounded up.

    The rows of its fused projection are ordered q, k, v (or k, v), then head, then head_dim, so that each is one slice;
    timm's are ordered head first.

    Args:
      dim: width of the tokens.
      out_dim: width of the output.
      num_heads: heads.
      subsampling: whether the queries are a quarter of the tokens.
      key_dim: of each head's queries and keys.
      value_dim: of each head's values.
      proj_scale: what the scale of the last batch norm starts from.
      grid: (height, width) of the keys in an image of the model's size: how far apart tokens may be that have a bias.
      attention: one of ATTENTIONS.
      form: one of FORMS.
      token_conv: as in `Attention`.
      token_kernel_size: as in `Attention`.
      implementation: as in `Attention`.
      layer: what `LinearNorm` takes.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        *,
        subsampling: bool,
        key_dim: int,
        value_dim: int,
        proj_scale: float,
        grid: tuple[int, int],
        attention: str,
        form: str,
        token_conv: str | None,
        token_kernel_size: int | None,
        implementation: str,
        layer: dict[str, Any],
    ):
        self.num_heads = num_heads
        self.fused_dims = (key_dim, value_dim) if subsampling else (key_dim, key_dim, value_dim)
        self.table_grid = grid
        self.attention = attention
        self.form = form
        self.implementation = implementation
        fused = num_heads * sum(self.fused_dims)
        self.qkv: Any = None if subsampling else LinearNorm(dim, fused, **layer)
        self.kv: Any = LinearNorm(dim, fused, **layer) if subsampling else None
        self.q: Any = Queries(dim, num_heads * key_dim, **layer) if subsampling else None
        self.proj = Projection(num_heads * value_dim, out_dim, bn_scale=proj_scale, **layer)
        param_dtype = layer["param_dtype"]
        self.token_kernel = new_token_kernel(attention, token_conv, token_kernel_size, num_heads, param_dtype)
        # What only a softmax uses: castling drops it with the branch, the linear kinds have no place for it.
        biases = nnx.Param(jnp.zeros((num_heads, grid[0] * grid[1]), param_dtype))
        self.attention_biases = biases if attention == "softmax" else None
        has_branch = attention == "castling" and form == "train"
        self.softmax_branch = nnx.Dict(attention_biases=biases) if has_branch else None

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        grid: tuple[int, int],
        mask_threshold: ArrayLike | None,
        training: bool,
    ) -> tuple[Float[Array, "batch queries out_channels"], Float[Array, ""]]:
        """The attention's output, and the mask density: the share of softmax weights kept, 0 without the branch."""
        if self.q is None:
            with jax.named_scope("qkv"):
                q, k, v = self._split(self.qkv, x, training)
            own_values, query_grid = None, grid
        else:
            with jax.named_scope("qkv"):
                k, v = self._split(self.kv, x, training)
                q = self.q(x, grid=grid, training=training).reshape(x.shape[0], -1, self.num_heads, k.shape[3])
            # A query of the new grid stands on one token of the old one, so 1/2 V is here, as in every other layer,
            # of each query the value of its own token. The token kernel takes the same values on the new grid: its
            # neighbours are the tokens that the layers behind work on, at a quarter of the work.
            own_values, query_grid = every_second(grid), halved(grid)
        out, density = attend(
            q,
            k,
            v,
            None if self.token_kernel is None else self.token_kernel[...],
            attention=self.attention,
            form=self.form,
            mask_threshold=mask_threshold,
            bias=self._bias(grid),
            query_values=own_values,
            grid=query_grid,
            implementation=self.implementation,
        )
        return self.proj(out.reshape(*out.shape[:2], -1), training=training), density

    def _split(self, layer: LinearNorm, x: Float[Array, "batch tokens channels"], training: bool) -> list[jax.Array]:
        """What a fused layer gives, part by part, [batch, tokens, heads, dim]."""
        edges = np.cumsum([self.num_heads * dim for dim in self.fused_dims])[:-1].tolist()
        if self.attention == "softmax" and layer.bn is not None:
            # Where no kernel wants arrays of their own, XLA takes parts of one normalised result for less.
            parts = jnp.split(layer(x, training=training), edges, axis=-1)
        else:
            parts = layer.split(x, edges, training=training)
        return [part.reshape(*part.shape[:2], self.num_heads, -1) for part in parts]

    def _bias(self, grid: tuple[int, int]) -> Float[Array, "1 heads queries keys"] | None:
        table = self.attention_biases if self.softmax_branch is None else self.softmax_branch.attention_biases
        if table is None:
            return None
        return bias_of_offsets(table[...], grid, self.table_grid, stride=1 if self.q is None else 2)


class LevitMlp(nnx.Module):
    """Two batch-normed layers with Hardswish between them; its output starts at zero."""

    def __init__(self, dim: int, hidden_dim: int, **layer: Any):
        self.ln1 = LinearNorm(dim, hidden_dim, **layer)
        self.ln2 = LinearNorm(hidden_dim, dim, bn_scale=0.0, **layer)

    @jax.named_scope("mlp")
    def __call__(self, x, *, training):
        return self.ln2(jax.nn.hard_swish(self.ln1(x, training=training)), training=training)


class LevitBlock(nnx.Module):
    """Attention and MLP, each a residual branch that starts at zero."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int,
        mlp_ratio: float,
        drop_path_rate: float,
        layer: dict[str, Any],
        **attention: Any,
    ):
        self.drop_path_rate = drop_path_rate
        self.attn = LevitAttention(
            dim,
            dim,
            num_heads,
            subsampling=False,
            key_dim=key_dim,
            value_dim=VALUE_RATIO * key_dim,
            proj_scale=0.0,
            layer=layer,
            **attention,
        )
        self.mlp = LevitMlp(dim, mlp_width(dim, mlp_ratio), **layer)

    def __call__(self, x, *, grid, mask_threshold, drawn):
        training = drawn is not None
        attended, density = self.attn(x, grid=grid, mask_threshold=mask_threshold, training=training)
        x = x + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
        return x + drop_path(self.mlp(x, training=training), self.drop_path_rate, of_layer(drawn, 1)), density


class LevitDownsample(nnx.Module):
    """The subsampling attention, which no residual passes by, and an MLP."""

    def __init__(
        self, dim: int, out_dim: int, *, key_dim: int, drop_path_rate: float, layer: dict[str, Any], **attention: Any
    ):
        self.drop_path_rate = drop_path_rate
        self.attn_downsample = LevitAttention(
            dim,
            out_dim,
            dim // key_dim,
            subsampling=True,
            key_dim=key_dim,
            value_dim=SUBSAMPLING_VALUE_RATIO * key_dim,
            proj_scale=1.0,
            layer=layer,
            **attention,
        )
        self.mlp = LevitMlp(out_dim, out_dim * SUBSAMPLING_MLP_RATIO, **layer)

    def __call__(self, x, *, grid, mask_threshold, drawn):
        training = drawn is not None
        x, density = self.attn_downsample(x, grid=grid, mask_threshold=mask_threshold, training=training)
        return x + drop_path(self.mlp(x, training=training), self.drop_path_rate, of_layer(drawn, 1)), density


class LevitStage(nnx.Module):
    """The blocks of one grid, behind the layer that shrinks the one before; `common` is what all layers take."""

    def __init__(
        self,
        dim: int,
        *,
        from_dim: int | None,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        grid: tuple[int, int],
        remat: bool,
        **common: Any,
    ):
        self.remat = remat
        self.downsample = None if from_dim is None else LevitDownsample(from_dim, dim, grid=grid, **common)
        grid = grid if from_dim is None else halved(grid)
        self.blocks = nnx.List(
            LevitBlock(dim, num_heads, mlp_ratio=mlp_ratio, grid=grid, **common) for _ in range(depth)
        )

    @property
    def layers(self) -> int:
        return len(self.blocks) + (self.downsample is not None)

    def __call__(self, x, *, grid, mask_threshold, drawn):
        """(tokens, their grid, the layers' mask densities)."""
        densities = []
        if self.downsample is not None:
            x, density = run_block(
                self.downsample, x, remat=self.remat, grid=grid, mask_threshold=mask_threshold, drawn=of_layer(drawn, 0)
            )
            grid = halved(grid)
            densities.append(density)
        for block in self.blocks:
            of_block = of_layer(drawn, len(densities))
            x, density = run_block(block, x, remat=self.remat, grid=grid, mask_threshold=mask_threshold, drawn=of_block)
            densities.append(density)
        return x, grid, densities


class LeViT(Backbone):
    """LeViT; `distilled` adds a second head, whose logits are averaged with the first's and which inference folds in.

    embed_dim, depth and num_heads have an entry a stage; every stage but the first begins with a subsampling attention,
    of as many heads as key_dim goes into the width before. Images of another size than `image_size` are taken too: the
    attention biases are of offsets in tokens, and so are looked up as they are; tokens farther apart than any in an
    image of the model's size have the bias of the farthest.

    Raises:
      InputError: image_size is no multiple of the stem's stride, or the stages' sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        attention: str,
        form: str,
        num_classes: int,
        image_size: int,
        embed_dim: tuple[int, ...],
        depth: tuple[int, ...],
        num_heads: tuple[int, ...],
        key_dim: int,
        in_chans: int = 3,
        mlp_ratio: float = 2.0,
        distilled: bool = False,
        drop_path_rate: float = 0.0,
        remat: bool = False,
        token_conv: str | None = "2d",
        token_kernel_size: int | None = None,
        implementation: str = "auto",
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        _check_stages(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        if embed_dim[0] % 8:
            raise InputError(f"the first embed_dim must be a multiple of 8, for the stem, not {embed_dim[0]}.")
        if key_dim > min(embed_dim):
            raise InputError(f"key_dim must be at most the widths {embed_dim}, not {key_dim}.")
        layer: dict[str, Any] = {"form": form, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_chans = in_chans
        self.stem = Stem(in_chans, embed_dim[0], **layer)
        grid = stem_grid((image_size, image_size))
        stages = []
        for i, dim in enumerate(embed_dim):
            stages.append(
                LevitStage(
                    dim,
                    from_dim=embed_dim[i - 1] if i else None,
                    depth=depth[i],
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratio,
                    grid=grid,
                    remat=remat,
                    key_dim=key_dim,
                    drop_path_rate=drop_path_rate,  # the same in all layers, as published
                    attention=attention,
                    form=form,
                    token_conv=token_conv,
                    token_kernel_size=token_kernel_size,
                    implementation=implementation,
                    layer=layer,
                )
            )
            grid = halved(grid) if i else grid
        self.stages = nnx.List(stages)
        self.head = NormLinear(embed_dim[-1], num_classes, **layer)
        has_second_head = distilled and form == "train"
        self.head_dist = NormLinear(embed_dim[-1], num_classes, **layer) if has_second_head else None

    def head_logits(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "heads batch classes"], Float[Array, "layers"]]:
        """Each head's logits in float32 and the mask density of each layer, subsampling attentions among them.

        With a key, drop-path is on and batch norm goes by the batch's statistics and updates its own, as in training.

        Raises:
          InputError: the image is no multiple of the stem's stride or has other channels, or a castling model in
            training form has no threshold.
        """
        features, densities = self._stages(images, mask_threshold, key)
        pooled = jnp.mean(features[-1], axis=(1, 2))
        heads = [self.head] if self.head_dist is None else [self.head, self.head_dist]
        logits = [head(pooled, training=key is not None) for head in heads]
        return jnp.stack(logits).astype(jnp.float32), densities

    def features(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "batch height width channels"]]:
        """The tokens behind each stage, at strides of 16, 32 and 64 pixels. Raises as a call does."""
        return self._stages(images, mask_threshold, key)[0]

    def _stages(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None
    ) -> tuple[list[jax.Array], jax.Array]:
        """The features of each stage and the mask density of each layer."""
        if images.shape[3] != self.in_chans:
            raise InputError(f"images must have {self.in_chans} channels, not {images.shape[3]}.")
        grid = stem_grid(images.shape[1:3])
        x = self.stem(images, training=key is not None)
        x = x.reshape(x.shape[0], math.prod(grid), x.shape[3])
        drawn = draw_drop_path(key, sum(stage.layers for stage in self.stages), x.shape[0])
        features: list[jax.Array] = []
        densities: list[jax.Array] = []
        for stage in self.stages:
            of_stage = of_layer(drawn, slice(len(densities), len(densities) + stage.layers))
            x, grid, kept = stage(x, grid=grid, mask_threshold=mask_threshold, drawn=of_stage)
            features.append(x.reshape(x.shape[0], *grid, x.shape[2]))
            densities += kept
        return features, jnp.stack(densities)


def _check_stages(**sizes: tuple[int, ...]) -> None:
    for name, values in sizes.items():
        if not isinstance(values, tuple) or not values or any(type(n) is not int or n < 1 for n in values):
            raise InputError(f"{name} must be a tuple of an integer of at least 1 for each stage, not {values}.")
    if len({len(values) for values in sizes.values()}) > 1:
        raise InputError(
            "embed_dim, depth and num_heads must have as many stages as each other, not "
            + ", ".join(str(len(values)) for values in sizes.values())
            + "."
        )


def stem_grid(size: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of tokens behind the stem, of an image of (height, width) pixels.

    Raises:
      InputError: either is not a multiple of the stem's stride.
    """
    height, width = size
    if min(size) < STEM_STRIDE or height % STEM_STRIDE or width % STEM_STRIDE:
        raise InputError(
            f"an image of {height} x {width} pixels is not a multiple of the stem's stride, {STEM_STRIDE} pixels."
        )
    return height // STEM_STRIDE, width // STEM_STRIDE


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of every second row and column; an odd one is rounded up, as 7 is to 4."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def every_second(grid: tuple[int, int]) -> Int[np.ndarray, "queries"]:
    """Every second token of every second row of the grid, the first among them."""
    return np.arange(math.prod(grid)).reshape(grid)[::2, ::2].ravel()


def bias_of_offsets(
    table: Float[Array, "heads offsets"], grid: tuple[int, int], table_grid: tuple[int, int], *, stride: int
) -> Float[Array, "1 heads queries keys"]:
    """The attention bias of each query and key: the table's at the offset between them, |dy| * columns + |dx|.

    Args:
      table: the biases.
      grid: (height, width) of the keys.
      table_grid: how many offsets (down, across) the table has; a larger one counts as the largest.
      stride: the queries are each such row's each such token.
    """
    offsets = [_offsets(length, limit, stride=stride) for length, limit in zip(grid, table_grid, strict=True)]
    on_grid = table.reshape(-1, *table_grid)
    # A TPU looks numbers up one at a time, and so adds their gradients; elsewhere it is the products that take long.
    bias = jax.lax.platform_dependent(
        on_grid, tpu=lambda table: _select(table, *offsets), default=lambda table: _look_up(table, *offsets)
    )
    return bias.reshape(1, len(table), len(offsets[0]) * len(offsets[1]), -1)


def _look_up(table: jax.Array, down: np.ndarray, across: np.ndarray) -> jax.Array:
    return table[:, down[:, None, :, None], across[None, :, None, :]]


def _select(table: jax.Array, down: np.ndarray, across: np.ndarray) -> jax.Array:
    rows, columns = (
        jax.nn.one_hot(x, size, dtype=table.dtype) for x, size in zip((down, across), table.shape[1:], strict=True)
    )
    return jnp.einsum("hij,yYi,xXj->hyxYX", table, rows, columns, precision=jax.lax.Precision.HIGHEST)


def _offsets(length: int, limit: int, *, stride: int) -> Int[np.ndarray, "queries keys"]:
    """How far the keys of one axis are from its queries, at most limit - 1."""
    places = np.arange(length)
    return np.minimum(np.abs(places[::stride, None] - places), limit - 1)


def fit_bias_table(
    table: Float[np.ndarray, "heads offsets"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "heads new_offsets"]:
    """The table of attention biases of a model of another image size: the same biases, in every image, as before."""
    down, across = (np.minimum(np.arange(new), old - 1) for new, old in zip(new_grid, grid, strict=True))
    return table.reshape(len(table), *grid)[:, down][:, :, across].reshape(len(table), -1)
