"""DeiT, the plain vision transformer (Touvron et al., ICML 2021), with any of the four attentions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError
from castling_jax.models.attention import Attention
from castling_jax.models.backbone import Backbone
from castling_jax.models.layers import (
    DEIT_STD,
    Mlp,
    PatchEmbed,
    draw_drop_path,
    drop_path,
    layer_norm,
    linear,
    mlp_width,
    normal_parameter,
    of_layer,
    run_block,
)
from castling_jax.models.position import resize_position_embedding


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        drop_path_rate: float,
        common: dict[str, Any],
        layer: dict[str, Any],
        **attention: Any,
    ):
        self.drop_path_rate = drop_path_rate
        self.norm1 = layer_norm(dim, **common)
        self.attn = Attention(dim, **attention, **layer)
        self.norm2 = layer_norm(dim, **common)
        self.mlp = Mlp(dim, mlp_width(dim, mlp_ratio), **layer)

    def __call__(self, x, *, grid, prefix_tokens, mask_threshold, drawn):
        attended, density = self.attn(
            self.norm1(x), grid=grid, prefix_tokens=prefix_tokens, mask_threshold=mask_threshold
        )
        x = x + drop_path(attended, self.drop_path_rate, of_layer(drawn, 0))
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, of_layer(drawn, 1)), density


class DeiT(Backbone):
    """DeiT; `distilled` adds the distillation token and its head, whose logits are averaged with the class head's.

    Images of another size than `image_size` are taken too: the position embedding is resized to their grid.

    Raises:
      InputError: image_size is no multiple of patch_size; and what `Attention` raises.
    """

    def __init__(
        self,
        *,
        attention: str,
        form: str,
        num_classes: int,
        image_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        distilled: bool = False,
        drop_path_rate: float = 0.0,
        remat: bool = False,
        token_conv: str | None = "1d",
        token_kernel_size: int | None = None,
        implementation: str = "auto",
        init_std: float = DEIT_STD,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        layer = common | {"init_std": init_std}
        self.patch_size = patch_size
        self.remat = remat
        self.in_chans = in_chans
        self.grid = patch_grid((image_size, image_size), patch_size)
        self.prefix_tokens = 2 if distilled else 1
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, **common)
        self.cls_token = normal_parameter(rngs, (1, 1, embed_dim), param_dtype)
        self.dist_token = normal_parameter(rngs, (1, 1, embed_dim), param_dtype) if distilled else None
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = normal_parameter(rngs, (1, tokens, embed_dim), param_dtype)
        self.blocks = nnx.List(
            Block(
                embed_dim,
                mlp_ratio=mlp_ratio,
                drop_path_rate=drop_path_rate * i / max(depth - 1, 1),  # linear over depth
                num_heads=num_heads,
                attention=attention,
                form=form,
                qkv_bias=qkv_bias,
                token_conv=token_conv,
                token_kernel_size=token_kernel_size,
                implementation=implementation,
                common=common,
                layer=layer,
            )
            for i in range(depth)
        )
        self.norm = layer_norm(embed_dim, **common)
        self.head = linear(embed_dim, num_classes, **layer)
        self.head_dist = linear(embed_dim, num_classes, **layer) if distilled else None

    def head_logits(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "heads batch classes"], Float[Array, "layers"]]:
        """Each head's logits in float32, and the mask density of each layer; with a key, drop-path is on.

        Raises:
          InputError: the image is no multiple of the patch or has other channels, or a castling model in training
            form has no threshold.
        """
        x, densities = self._tokens(images, mask_threshold, key)
        with jax.named_scope("head"):
            logits = [self.head(x[:, 0])]
            if self.head_dist is not None:
                logits.append(self.head_dist(x[:, 1]))
        return jnp.stack(logits).astype(jnp.float32), densities

    def features(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        mask_threshold: ArrayLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "batch height width channels"]]:
        """One entry: the normed tokens of the patches, without class and distillation token. Raises as a call does."""
        x, _ = self._tokens(images, mask_threshold, key)
        grid = patch_grid(images.shape[1:3], self.patch_size)
        return [x[:, self.prefix_tokens :].reshape(x.shape[0], *grid, x.shape[2])]

    def _tokens(
        self, images: jax.Array, mask_threshold: ArrayLike | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """All tokens behind the last norm, prefix first, and the mask densities."""
        if images.shape[3] != self.in_chans:
            raise InputError(f"images must have {self.in_chans} channels, not {images.shape[3]}.")
        grid = patch_grid(images.shape[1:3], self.patch_size)
        tokens = self.patch_embed(images)
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        prefix = [jnp.broadcast_to(token, (images.shape[0], *token.shape[1:])).astype(tokens.dtype) for token in prefix]
        positions = resize_position_embedding(self.pos_embed[...], self.grid, grid, self.prefix_tokens)
        x = jnp.concatenate([*prefix, tokens], axis=1) + positions.astype(tokens.dtype)
        drawn = draw_drop_path(key, len(self.blocks), x.shape[0])
        densities = []
        for i, block in enumerate(self.blocks):
            x, density = run_block(
                block,
                x,
                remat=self.remat,
                grid=grid,
                prefix_tokens=self.prefix_tokens,
                mask_threshold=mask_threshold,
                drawn=of_layer(drawn, i),
            )
            densities.append(density)
        return self.norm(x), jnp.stack(densities)


def patch_grid(size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of (height, width) pixels.

    Raises:
      InputError: either is not a multiple of the patch.
    """
    height, width = size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise InputError(f"an image of {height} x {width} pixels is not a multiple of the patch, {patch_size} pixels.")
    return height // patch_size, width // patch_size
