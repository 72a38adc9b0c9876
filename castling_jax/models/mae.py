"""The masked autoencoder (He et al., CVPR 2022) on a plain transformer with any kind of attention.

Most patches of an image are hidden. The backbone sees only the others, and a small decoder reconstructs the pixels of
all. After this pre-training the backbone starts a classifier, a detector or a segmenter, and the decoder is dropped.

The decoder has softmax attention, as MAE has. Castling-ViT's authors do not state theirs: that only the backbone is
castled is our reading.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from castling_jax.errors import InputError, about
from castling_jax.models.attention.core import Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.attention.kinds import make_core
from castling_jax.models.backbone import Backbone, DenseConfig
from castling_jax.models.deit import Block, DeiT, DeiTConfig
from castling_jax.models.layers import Layers
from castling_jax.models.model import Model
from castling_jax.models.position import sincos_position_embedding
from castling_jax.sizes import ImageSize

# An evaluation has so few masks that an image has the same one, and the same loss, in batches of any multiple of them.
FIXED_MASKS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAEConfig(DenseConfig):
    """The masked autoencoder's constructor arguments.

    There is no classifier, so the number of classes has no effect. The backbone has `fixed_positions` and
    `init_std=None` unless `backbone_arguments` say otherwise, as MAE does.

    Attributes:
      mask_ratio: share of the patches that are hidden.
      norm_pix_loss: whether the model predicts each patch with mean 0 and variance 1, the authors' word.
      decoder_embed_dim: width of the decoder.
      decoder_depth: number of the decoder's blocks.
      decoder_num_heads: heads of the decoder's attention.
    """

    num_classes: int = 1
    image_size: ImageSize = 224
    backbone: str = "deit_base"
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16


class MAE(Model):
    """A masked autoencoder. Its modules have the names of the authors' code, except that the encoder is `backbone`.

    The image's patches are hidden at random. A training step draws the mask from its key; an evaluation draws it from
    a fixed key, unless it is given one.

    Attention does not depend on the order of its tokens, but a castling layer's taps do. So the visible patches stay in
    raster order, not in the order of the draw as in MAE: taps over tokens then read the next visible patches before and
    after, and taps over the grid (token_conv="2d") read the patches' own neighbours, where the hidden ones are zero.

    Raises:
      InputError: the backbone is no plain transformer, its attention needs all patches, or the mask ratio leaves no
        patch, or hides none.
    """

    task: ClassVar[str] = "reconstruction"
    draws: ClassVar[bool] = True
    backbone_defaults: ClassVar[dict[str, Any]] = {"fixed_positions": True, "init_std": None}

    def __init__(self, config: MAEConfig, backbone: Backbone, layers: Layers):
        if not isinstance(backbone, DeiT):
            raise InputError(
                f"a masked autoencoder needs a plain transformer such as deit_base, not {config.backbone}."
            )
        attention = backbone.blocks[0].attn
        if type(attention) is not MultiHeadAttention or attention.core.pools_qkv:
            raise InputError(
                "this attention needs all patches of an image, and a masked autoencoder hides most of them: choose "
                "one that takes any tokens, such as castling, and no qkv_pool."
            )
        if backbone.norm is None:
            raise InputError(
                "a masked autoencoder needs the backbone's last norm, which global_pool = 'avg' leaves out: set it for "
                "the classifier alone, which starts from the autoencoder."
            )
        self.backbone = backbone
        self.in_chans = backbone.in_chans
        self.norm_pix_loss = config.norm_pix_loss
        self.visible = int(math.prod(backbone.grid) * (1 - config.mask_ratio))
        if not 0 < self.visible < math.prod(backbone.grid):
            raise InputError(
                f"mask_ratio = {config.mask_ratio} shows {self.visible} of {math.prod(backbone.grid)} patches: at "
                "least one must be visible and one hidden."
            )
        layers = dataclasses.replace(layers, init_std=None)
        dim, prefix = config.decoder_embed_dim, backbone.prefix_tokens
        hidden, width = backbone.blocks[0].mlp.fc1.out_features, backbone.feature_channels[0]
        block = DeiTConfig(
            embed_dim=dim, depth=config.decoder_depth, num_heads=config.decoder_num_heads, mlp_ratio=hidden / width
        )
        core = make_core("softmax", "train", token_conv=None)
        self.decoder_embed = layers.linear(width, dim)
        self.mask_token = layers.embedding(1, 1, dim)
        with about("a masked autoencoder's decoder"):
            positions = sincos_position_embedding(backbone.grid, dim, prefix)
            self.decoder_pos_embed = nnx.Param(jnp.asarray(positions, layers.param_dtype))
            self.decoder_blocks = nnx.List(
                Block(block, core, layers, drop_path_rate=0.0) for _ in range(config.decoder_depth)
            )
        self.decoder_norm = layers.layer_norm(dim)
        self.decoder_pred = layers.linear(dim, backbone.patch_size**2 * self.in_chans)

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """As in `Model`, but a key draws the mask and does not turn training mode on.

        Without a key, an image's place in the batch decides which of FIXED_MASKS masks it has.
        """
        period = FIXED_MASKS if key is None else None
        return self._reconstruct(images, mask_threshold, mask_key=_or_fixed(key), key=None, period=period)

    def training_outputs(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """The outputs and the backbone's mask densities.

        Returns:
          A pair (outputs, densities [layers]); outputs is a dict in float32 with

          "reconstruction" [batch, patches, patch pixels]: the predicted pixels of all patches, which the loss may have
            normalised; patches row by row, and in a patch row, column, channel, the channel fastest.
          "mask" [batch, patches]: 1 for a hidden patch, 0 for a visible one.

        Raises:
          InputError: the images have another size than the model, or the backbone refuses them.
        """
        return self._reconstruct(images, mask_threshold, mask_key=jax.random.fold_in(_or_fixed(key), 0), key=key)

    def results(self, outputs: dict[str, Array]) -> dict[str, Array]:
        return outputs

    def _reconstruct(
        self,
        images: jax.Array,
        mask_threshold: ArrayLike | None,
        *,
        mask_key: jax.Array,
        key: jax.Array | None,
        period: int | None = None,
    ) -> tuple[dict[str, Array], jax.Array]:
        """The outputs. Images have the same mask if their places in the batch differ by a multiple of `period`."""
        tokens, grid = self.backbone.embed(self._checked(images))
        if grid != self.backbone.grid:
            raise InputError(
                f"the images have {grid} patches, and this masked autoencoder is for {self.backbone.grid}."
            )
        # A key for each image: an exported program takes any number of images, and one draw needs a known number.
        places = jnp.arange(images.shape[0])
        numbers = places if period is None else places % period
        keys = jax.vmap(lambda number: jax.random.fold_in(mask_key, number))(numbers)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (math.prod(grid),)))(keys)
        return self.reconstruct(tokens, noise, mask_threshold, key)

    def reconstruct(
        self,
        tokens: Float[Array, "batch tokens embed_dim"],
        noise: Float[Array, "batch patches"],
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Array], Float[Array, "layers"]]:
        """The result of `training_outputs` for tokens from the backbone's `embed`.

        The patches with the smallest noise are visible.
        """
        prefix, places = self.backbone.prefix_tokens, Places(self.backbone.grid, self.backbone.prefix_tokens)
        hidden = _ranks(noise) >= self.visible
        # A stable sort by "hidden": the visible patches come first, in raster order.
        kept = jnp.argsort(hidden, axis=1, stable=True)[:, : self.visible]
        seen = jnp.take_along_axis(tokens[:, prefix:], kept[:, :, None], axis=1)
        seen = jnp.concatenate([tokens[:, :prefix], seen], axis=1)
        encoded, densities = self.backbone.transform(seen, dataclasses.replace(places, kept=kept), mask_threshold, key)
        with jax.named_scope("decoder"):
            prediction = self._decode(encoded, hidden, places)
        outputs = {"reconstruction": prediction, "mask": hidden}
        return jax.tree.map(lambda array: array.astype(jnp.float32), outputs), densities

    def _decode(
        self,
        encoded: Float[Array, "batch visible embed_dim"],
        hidden: Bool[Array, "batch patches"],
        places: Places,
    ) -> Float[Array, "batch patches pixels"]:
        prefix = places.prefix_tokens
        x = self.decoder_embed(encoded)
        # The n-th visible patch stands at the n-th place that is not hidden.
        numbers = jnp.maximum(jnp.cumsum(~hidden, axis=1) - 1, 0)
        visible = jnp.take_along_axis(x[:, prefix:], numbers[:, :, None], axis=1)
        patches = jnp.where(hidden[:, :, None], self.mask_token[...].astype(x.dtype), visible)
        positions = jax.lax.stop_gradient(self.decoder_pos_embed[...]).astype(x.dtype)
        x = jnp.concatenate([x[:, :prefix], patches], axis=1) + positions
        for block in self.decoder_blocks:
            x, _ = block(x, places=places, mask_threshold=None, drawn=None)
        return self.decoder_pred(self.decoder_norm(x))[:, prefix:]


def patches_of(
    images: Float[Array, "batch height width channels"], patch_size: int
) -> Float[Array, "batch patches pixels"]:
    """An image's patches, row by row; in a patch row, column, channel, the channel fastest."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return jnp.moveaxis(cut, 3, 2).reshape(batch, rows * columns, -1)


def image_of(
    patches: Float[Array, "batch patches pixels"], patch_size: int, grid: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patches_of`; `grid` is (rows, columns) of the patches."""
    rows, columns = grid
    cut = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, -1)
    return jnp.moveaxis(cut, 3, 2).reshape(patches.shape[0], rows * patch_size, columns * patch_size, -1)


def _ranks(noise: Float[Array, "batch patches"]) -> Array:
    """Each number's place in its row's order, from 0; equal numbers keep their order."""
    return jnp.argsort(jnp.argsort(noise, axis=1, stable=True), axis=1, stable=True)


def _or_fixed(key: jax.Array | None) -> jax.Array:
    return jax.random.key(0) if key is None else key
