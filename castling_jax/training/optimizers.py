"""The optimiser."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, with weight decay on matrices only, behind an optional clip of the gradients' global norm."""
    adamw = optax.adamw(
        learning_rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=decay_mask
    )
    if optimizer.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)


def decay_mask(params: Any) -> Any:
    """True for the kernels of linear and convolution layers.

    Biases, norms, tokens, position embeddings and the token kernels' taps are not decayed (DeiT's recipe).
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
