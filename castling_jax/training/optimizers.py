"""The optimiser."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, with weight decay on matrices only, behind optional clips of the gradients.

    `clip_norm` is of all gradients' norm together; `adaptive_clip` of each output unit's norm, as a share of the norm
    of that unit's weights (Brock et al., NFNets, equation 3).
    """
    clips = []
    if optimizer.adaptive_clip is not None:
        clips.append(adaptive_clip(optimizer.adaptive_clip))
    if optimizer.clip_norm is not None:
        clips.append(optax.clip_by_global_norm(optimizer.clip_norm))
    adamw = optax.adamw(
        learning_rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=decay_mask
    )
    return optax.chain(*clips, adamw) if clips else adamw


def adaptive_clip(share: float) -> optax.GradientTransformation:
    """optax.adaptive_grad_clip, of what it would take for a matrix by its shape too.

    The units of LeViT's attention biases [heads, offsets], of focused attention's scales [heads, channels] and of token
    kernels [..., heads] are heads; the first are so in timm.
    """

    def axis(name: str, ndim: int) -> int | tuple[int, ...] | None:
        if name in ("attention_biases", "focus_scale"):
            return 1
        return tuple(range(ndim - 1)) if name == "token_kernel" else None

    def clip(path: Any, update: jax.Array, weights: jax.Array) -> jax.Array:
        by_unit = optax.adaptive_grad_clip(share, axis=axis(path[-1].key, weights.ndim))
        return by_unit.update(update, by_unit.init(weights), weights)[0]

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clip, updates, params))


def decay_mask(params: Any) -> Any:
    """True for the kernels of linear and convolution layers, and for MViTv2's tables of relative positions.

    Biases, norms, tokens, position embeddings, LeViT's attention biases and Swin's bias table are not decayed (the
    recipes of DeiT, LeViT, MViTv2 and Swin). That the taps of token kernels and focused attention's scales are not
    decayed either is our choice: no recipe is published for them, and timm's rule, which decays all arrays of two and
    more axes, would decay them.
    """
    decayed = ("kernel", "rel_pos_h", "rel_pos_w")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)
