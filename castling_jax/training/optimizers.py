"""The optimisers."""

import functools
import operator
import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from castling_jax.models.variables import flatten, unflatten

FIRST = ("patch_embed", "stem", "cls_token", "dist_token", "pos_embed")  # the parameters before the first block


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum, with weight decay on matrices only, after optional clipping of the gradients.

    SGD's weight decay is L2 regularisation: it is added to the gradients, and so goes through momentum and learning
    rate, as in PyTorch and Paddle. AdamW's is no part of the gradients.

    `clip_norm` limits the norm of all gradients together. `adaptive_clip` limits the norm of each output unit's
    gradient, as a share of the norm of that unit's weights (Brock et al., NFNets, equation 3). `layer_decay` lowers the
    rates of early layers, as `layer_rates` says.
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
    rates = []
    if optimizer.layer_decay is not None:
        # After the update: weight decay is lowered with the rest, as it is where each layer has a rate of its own.
        decay_layers = functools.partial(layer_rates, decay=optimizer.layer_decay)
        rates.append(optax.stateless(lambda updates, params: jax.tree.map(operator.mul, updates, decay_layers(params))))
    parts = [*clips, update, *rates]
    return optax.chain(*parts) if len(parts) > 1 else update


def layer_rates(params: Any, decay: float) -> Any:
    """Each parameter's factor of the learning rate: decay^(n + 1 - i) in layer i of a backbone with n blocks.

    Layer 0 holds the patch embedding, the stem, tokens and positions; layer i is the i-th block of all stages, and what
    a stage has beside its blocks is a layer before them. Everything after the blocks, and all that is not in the
    backbone, has the factor 1 (Bao et al., BEiT; the rule of MAE's fine-tuning).
    """
    layers = {path: _layer(path) for path in flatten(params)}
    order = sorted({*layers.values()})
    return unflatten({path: decay ** (len(order) - 1 - order.index(layer)) for path, layer in layers.items()})


def _layer(path: str) -> tuple[int, ...]:
    """A parameter's layer; layers have the order of these tuples: before the blocks, stage and block, after them."""
    name = path.removeprefix("backbone/")
    if name.startswith(FIRST):
        return (0,)
    places = re.match(r"(?:stages/(\d+)/)?(?:blocks/(\d+)/)?", name)
    if places is None or not places[0]:
        return (2,)
    return (1, *(-1 if place is None else int(place) for place in places.groups()))


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
