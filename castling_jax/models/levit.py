"""LeViT (Graham et al., ICCV 2021) with any kind of attention: a convolutional stem, then three shrinking grids.

Batch norm follows every linear layer and convolution; at inference it is folded into them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from castling_jax.errors import check, check_at_most
from castling_jax.models.attention.core import Core
from castling_jax.models.backbone import Backbone, BackboneConfig
from castling_jax.models.batch_norm import ConvNorm, LinearNorm, NormLinear
from castling_jax.models.layers import (
    Layers,
    check_stages,
    draw_drop_path,
    drop_path,
    mlp_width,
    of_layer,
    patch_grid,
    run_block,
)
from castling_jax.ops.around import Around
from castling_jax.ops.tokens import select_tokens
from castling_jax.sizes import image_shape

STEM_STRIDE = 16
# Value channels for each key channel; the MLP's ratio where the grid shrinks, which ignores mlp_ratio, as in timm.
VALUE_RATIO, SUBSAMPLING_VALUE_RATIO = 2, 4
SUBSAMPLING_MLP_RATIO = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeViTConfig(BackboneConfig):
    """LeViT's constructor arguments.

    Attributes:
      embed_dim: width of each stage.
      depth: number of blocks of each stage.
      num_heads: number of heads in each stage.
      key_dim: width of each head's queries and keys.
      distilled: whether there is a second head, for distillation.
    """

    embed_dim: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: tuple[int, ...]
    key_dim: int
    mlp_ratio: float = 2.0
    distilled: bool = False


class Stem(nnx.Module):
    """Four convolutions of stride 2 with Hardswish between them."""

    def __init__(self, config: LeViTConfig, layers: Layers):
        dim = config.embed_dim[0]
        self.conv1 = ConvNorm(config.in_chans, dim // 8, layers)
        self.conv2 = ConvNorm(dim // 8, dim // 4, layers)
        self.conv3 = ConvNorm(dim // 4, dim // 2, layers)
        self.conv4 = ConvNorm(dim // 2, dim, layers)

    @jax.named_scope("stem")
    def __call__(self, x, *, training):
        """The third convolution's output after Hardswish, a feature map, and the fourth's, the tokens."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.hard_swish(conv(x, training=training))
        return x, self.conv4(x, training=training)


class Projection(nnx.Module):
    """A batch-normed linear layer."""

    def __init__(self, ln: LinearNorm):
        self.ln = ln

    @jax.named_scope("proj")
    def __call__(self, x, *, training):
        return self.ln(x, training=training)


class Queries(nnx.Module):
    """The batch-normed layer of a subsampling attention's queries."""

    def __init__(self, ln: LinearNorm):
        self.ln = ln


class LevitAttention(nnx.Module):
    """LeViT's attention. The output of a subsampling attention has half the grid's height and width, rounded up.

    The rows of the fused projection are ordered q, k, v (or k, v), then head, then head_dim, so that q, k and v are one
    slice each. In timm the order is head first.

    Args:
      dim: width of the tokens.
      out_dim: width of the output.
      num_heads: heads.
      key_dim: width of each head's queries and keys.
      grid: (height, width) of the keys in an image of the model's size; the table of biases has an entry for each
        offset within this grid.
      core: the attention between the projections.
      layers: makes the layers.
      subsampling: whether the queries are a quarter of the tokens. The other attentions are residual branches, and
        start at zero.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        key_dim: int,
        grid: tuple[int, int],
        core: Core,
        layers: Layers,
        *,
        subsampling: bool,
    ):
        value_dim = key_dim * (SUBSAMPLING_VALUE_RATIO if subsampling else VALUE_RATIO)
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.fused_dims = (key_dim, value_dim) if subsampling else (key_dim, key_dim, value_dim)
        self.table_grid = grid
        self.core = core
        fused = num_heads * sum(self.fused_dims)
        self.qkv: Any = None if subsampling else LinearNorm(dim, fused, layers)
        self.kv: Any = LinearNorm(dim, fused, layers) if subsampling else None
        self.q: Any = Queries(LinearNorm(dim, num_heads * key_dim, layers)) if subsampling else None
        # A subsampling attention has no skip path: if it started at zero, so would all tokens after it.
        bn_scale = 1.0 if subsampling else 0.0
        self.proj = Projection(LinearNorm(num_heads * value_dim, out_dim, layers, bn_scale=bn_scale))
        biases = layers.zeros(num_heads, grid[0] * grid[1])
        core.add_parameters(self, layers, attention_biases=biases)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        *,
        grid: tuple[int, int],
        mask_threshold: ArrayLike | None,
        training: bool,
    ) -> tuple[Float[Array, "batch queries out_channels"], Float[Array, ""]]:
        """The attention's output, and the mask density: the share of softmax weights that the mask keeps, or 0."""
        if self.q is None:
            with jax.named_scope("qkv"):
                parts, norms = self._split(self.qkv, x, self._edges, training)
            query_values, query_grid = None, grid
        else:
            with jax.named_scope("qkv"):
                # Tokens are dropped before the layer of the queries, which then has a quarter of the work.
                queries = self._split(self.q.ln, select_tokens(x, every_second(grid)), [], training)
                keys = self._split(self.kv, x, self._edges, training)
            parts, norms = queries[0] + keys[0], queries[1] + keys[1]
            # A query of the new grid stands on one token of the old grid, so V in its 1/2 V is the value of that token.
            # The token kernel convolves the same values over the new grid, whose neighbours are the tokens of the later
            # layers; over the old grid it would cost four times as much.
            query_values, query_grid = every_second(grid), halved(grid)
        q, k, v = map(self._by_heads, parts)
        around = Around(activation="hard_swish")
        if norms:
            q_norm, k_norm, v_norm = map(self._by_heads, norms)
            around = around._replace(norms=(q_norm, k_norm, v_norm))
        out, density = self.core.kind(
            q,
            k,
            v,
            mask_threshold=mask_threshold,
            bias=self._bias(grid),
            query_values=query_values,
            grid=query_grid,
            around=around,
            **self.core.inputs_of(self),
        )
        return self.proj(out.reshape(*out.shape[:2], -1), training=training), density

    def _split(
        self, layer: LinearNorm, x: Float[Array, "batch tokens channels"], edges: Sequence[int], training: bool
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """A layer's result cut at these channels, and the parts' norms where the attention has to apply them."""
        if not self.core.kind.taps and layer.bn is not None:
            # Taps and kernels read q, k and v as separate arrays. Without them slicing one result is cheaper.
            return jnp.split(layer(x, training=training), edges, axis=-1), []
        return layer.split(x, edges, training=training)

    @property
    def _edges(self) -> list[int]:
        """Where the fused layer's channels are cut."""
        return np.cumsum([self.num_heads * dim for dim in self.fused_dims])[:-1].tolist()

    def _by_heads(self, x: Float[Array, "*axes channels"]) -> Float[Array, "*axes heads dim"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def _bias(self, grid: tuple[int, int]) -> Float[Array, "1 heads queries keys"] | None:
        tables = self.core.tables_of(self)
        if tables is None:
            return None
        return bias_of_offsets(tables.attention_biases[...], grid, self.table_grid, stride=1 if self.q is None else 2)


class LevitMlp(nnx.Module):
    """Two batch-normed layers with Hardswish between them; the output starts at zero."""

    def __init__(self, dim: int, mlp_ratio: float, layers: Layers):
        hidden_dim = mlp_width(dim, mlp_ratio)
        self.ln1 = LinearNorm(dim, hidden_dim, layers)
        self.ln2 = LinearNorm(hidden_dim, dim, layers, bn_scale=0.0)

    @jax.named_scope("mlp")
    def __call__(self, x, *, training):
        return self.ln2(jax.nn.hard_swish(self.ln1(x, training=training)), training=training)


class LevitBlock(nnx.Module):
    """Attention and MLP, each a residual branch that starts at zero."""

    def __init__(self, attn: LevitAttention, mlp: LevitMlp, drop_path_rate: float):
        self.drop_path_rate = drop_path_rate
        self.attn = attn
        self.mlp = mlp

    def __call__(self, x, *, drawn, **inputs):
        training = drawn is not None
        attended, density = self.attn(x, training=training, **inputs)
        x = x + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
        return x + drop_path(self.mlp(x, training=training), self.drop_path_rate, of_layer(drawn, 1)), density


class LevitDownsample(nnx.Module):
    """The first layer of every stage but the first: a subsampling attention, which has no skip path, and an MLP."""

    def __init__(self, attn_downsample: LevitAttention, mlp: LevitMlp, drop_path_rate: float):
        self.drop_path_rate = drop_path_rate
        self.attn_downsample = attn_downsample
        self.mlp = mlp

    def __call__(self, x, *, drawn, **inputs):
        training = drawn is not None
        x, density = self.attn_downsample(x, training=training, **inputs)
        return x + drop_path(self.mlp(x, training=training), self.drop_path_rate, of_layer(drawn, 1)), density


class LevitStage(nnx.Module):
    """The blocks on one grid. Stages after the first, whose number is 0, begin with the layer that shrinks the grid."""

    def __init__(self, config: LeViTConfig, stage: int, grid: tuple[int, int], core: Core, layers: Layers):
        dim, key_dim, rate = config.embed_dim[stage], config.key_dim, config.drop_path_rate  # one rate, as published
        self.remat = config.remat
        downsample = None
        if stage:
            # Its heads divide the width before among keys of key_dim; config.num_heads counts the blocks' heads only.
            before = config.embed_dim[stage - 1]
            attn = LevitAttention(before, dim, before // key_dim, key_dim, grid, core, layers, subsampling=True)
            downsample = LevitDownsample(attn, LevitMlp(dim, SUBSAMPLING_MLP_RATIO, layers), rate)
            grid = halved(grid)
        self.downsample = downsample
        blocks = []
        for _ in range(config.depth[stage]):
            attn = LevitAttention(dim, dim, config.num_heads[stage], key_dim, grid, core, layers, subsampling=False)
            blocks.append(LevitBlock(attn, LevitMlp(dim, config.mlp_ratio, layers), rate))
        self.blocks = nnx.List(blocks)

    @property
    def layers(self) -> int:
        return len(self.blocks) + (self.downsample is not None)

    def __call__(self, x, *, grid, drawn, **inputs):
        """Returns (tokens, grid of these tokens, mask densities of the layers)."""
        densities: list[jax.Array] = []
        for layer in (self.downsample, *self.blocks):
            if layer is None:
                continue
            # `densities` has one entry for each layer so far, so its length is this layer's number.
            of_block = of_layer(drawn, len(densities))
            x, density = run_block(layer, x, remat=self.remat, grid=grid, drawn=of_block, **inputs)
            grid = halved(grid) if layer is self.downsample else grid
            densities.append(density)
        return x, grid, densities


class LeViT(Backbone):
    """LeViT; `distilled` adds a second head, and the two heads' logits are averaged, which the inference form folds in.

    embed_dim, depth and num_heads have an entry for each stage. Every stage but the first begins with a subsampling
    attention, which has (width of the stage before) // key_dim heads. The model also takes images of other sizes than
    `image_size`: attention biases belong to offsets in tokens and stay as they are. Tokens farther apart than any two
    in an image of the model's size get the bias of the largest offset.

    Raises:
      InputError: image_size is not a multiple of the stem's stride, or the stages' sizes do not fit each other.
    """

    stem_maps: ClassVar[int] = 1

    def __init__(self, config: LeViTConfig, core: Core, layers: Layers):
        widths, classes = config.embed_dim, config.num_classes
        check_stages(embed_dim=widths, depth=config.depth, num_heads=config.num_heads)
        check(widths[0] % 8 == 0, f"the first embed_dim must be a multiple of 8, for the stem, not {widths[0]}.")
        check_at_most("key_dim", config.key_dim, min(widths), f"the least of {widths}")
        self.in_chans = config.in_chans
        self.stem = Stem(config, layers)
        grid = patch_grid(image_shape(config.image_size), STEM_STRIDE, "the stem's stride")
        stages = []
        for stage in range(len(widths)):
            stages.append(LevitStage(config, stage, grid, core, layers))
            # After the stage, because a stage is given the grid of its input and halves it itself.
            grid = halved(grid) if stage else grid
        self.stages = nnx.List(stages)
        self.head: Any = NormLinear(widths[-1], classes, layers) if classes else None
        has_second_head = classes and config.distilled and not layers.folded  # folding averages the two heads
        self.head_dist = NormLinear(widths[-1], classes, layers) if has_second_head else None
        self.feature_strides = (STEM_STRIDE // 2, *(STEM_STRIDE * 2**stage for stage in range(len(widths))))
        self.feature_channels = (widths[0] // 2, *widths)

    def _encode(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None, *, for_maps: bool
    ) -> tuple[list[jax.Array], jax.Array]:
        """The feature maps, and the mask densities of all attentions, also the subsampling ones."""
        grid = patch_grid(images.shape[1:3], STEM_STRIDE, "the stem's stride")
        stem, x = self.stem(images, training=key is not None)
        x = x.reshape(x.shape[0], math.prod(grid), x.shape[3])
        drawn = draw_drop_path(key, sum(stage.layers for stage in self.stages), x.shape[0])
        features: list[jax.Array] = [stem]
        densities: list[jax.Array] = []
        for stage in self.stages:
            # Which samples a layer drops depends on its number in the model, not in the stage.
            of_stage = of_layer(drawn, slice(len(densities), len(densities) + stage.layers))
            x, grid, kept = stage(x, grid=grid, mask_threshold=mask_threshold, drawn=of_stage)
            features.append(x.reshape(x.shape[0], *grid, x.shape[2]))
            densities += kept
        return features, jnp.stack(densities)

    def _classify(self, encoded, densities, *, training):
        pooled = jnp.mean(encoded[-1], axis=(1, 2))
        heads = [self.head] if self.head_dist is None else [self.head, self.head_dist]
        logits = [head(pooled, training=training) for head in heads]
        return jnp.stack(logits).astype(jnp.float32), densities

    def _maps(self, encoded, densities):
        return encoded, densities


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of every second row and column; an odd side is rounded up, as 7 is to 4."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def every_second(grid: tuple[int, int]) -> Int[np.ndarray, "queries"]:
    """The indices of every second token in every second row of the grid, from the first token on."""
    return np.arange(math.prod(grid)).reshape(grid)[::2, ::2].ravel()


def bias_of_offsets(
    table: Float[Array, "heads offsets"], grid: tuple[int, int], table_grid: tuple[int, int], *, stride: int
) -> Float[Array, "1 heads queries keys"]:
    """The attention bias of each query and key: the table's entry for their offset, |dy| * columns + |dx|.

    Args:
      table: the biases.
      grid: (height, width) of the keys.
      table_grid: number of offsets (down, across) in the table; larger offsets get the entry of the largest one.
      stride: the queries stand on every stride-th token of every stride-th row.
    """
    offsets = [_offsets(length, limit, stride=stride) for length, limit in zip(grid, table_grid, strict=True)]
    on_grid = table.reshape(-1, *table_grid)
    # A TPU gathers numbers, and scatters their gradients, one at a time. Elsewhere a gather beats the products.
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
    """The distances between queries and keys along one axis, at most limit - 1."""
    places = np.arange(length)
    return np.minimum(np.abs(places[::stride, None] - places), limit - 1)


def fit_bias_table(
    table: Float[np.ndarray, "heads offsets"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "heads new_offsets"]:
    """Turns a table of attention biases into one for another image size: every offset keeps its bias."""
    down, across = (np.minimum(np.arange(new), old - 1) for new, old in zip(new_grid, grid, strict=True))
    return table.reshape(len(table), *grid)[:, down][:, :, across].reshape(len(table), -1)
