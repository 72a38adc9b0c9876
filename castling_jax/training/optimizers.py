"""The optimisers."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum, with weight decay on matrices only, after optional clipping of the gradients.

    SGD's weight decay is L2 regularisation: it is added to the gradients, and so goes through momentum and learning
    rate, as in PyTorch and Paddle. AdamW's is no part of the gradients.

    `clip_norm` limits the norm of all gradients together. `adaptive_clip` limits the norm of each output unit's
    gradient, as a share of the norm of that unit's weights (Brock et al., NFNets, equation 3).
    """
    clips = []
    if optimizer.adaptive_clip is not None:
        clips.append(adaptive_clip(optimizer.adaptive_clip))
    if optimizer.clip_norm is not None:
        clips.append(optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.name == "sgd":
        decay = optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask)
        update = optax.chain(decay, optax.sgd(learning_rate, momentum=optimizer.momentum))
    else:
        update = optax.adamw(
            learning_rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=decay_mask
        )
    return optax.chain(*clips, update) if clips else update


def adaptive_clip(share: float) -> optax.GradientTransformation:
    """optax.adaptive_grad_clip with the right units for arrays that it would take for matrices because of their shape.

    In LeViT's attention biases [heads, offsets], focused attention's scales [heads, channels] and token kernels
    [..., heads], a unit is a head; timm treats the attention biases in this way too.
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

    Biases, norms, tokens, position embeddings, LeViT's attention biases and Swin's bias table are not decayed, as in
    the recipes of DeiT, LeViT, MViTv2 and Swin. Leaving out the taps of token kernels and focused attention's scales is
    our choice: no recipe is published for them, and timm's rule, which decays all arrays with two or more axes, would
    decay them.
    """
    decayed = ("kernel", "rel_pos_h", "rel_pos_w")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)
