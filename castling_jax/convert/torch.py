"""Between our variables and PyTorch state dicts under timm 1.0's parameter names.

Our modules carry timm's names, so a path becomes a name by joining it with dots; only a leaf's own name and layout
differ, and a castling model's `softmax_branch` is no level in timm. The token kernel, which timm does not have, is
named as in the paper authors' block.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from castling_jax.convert.inference import SOFTMAX_BRANCH
from castling_jax.models.backbone import Backbone
from castling_jax.models.levit import LeViT, fit_bias_table
from castling_jax.models.position import resize_position_embedding, resize_relative_positions
from castling_jax.models.variables import Variables, check_variables, flatten, get_variables, unflatten
from castling_jax.ops.errors import InputError

_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "token_kernel": "dconv.weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Buffers that state dicts may hold and that say nothing: PyTorch counts batches where no momentum is given, and older
# LeViTs keep what can be computed. `to_torch` leaves them out; load_state_dict(strict=True) does not miss them.
_IGNORED = ("num_batches_tracked", "attention_bias_idxs")
# What only a softmax uses, and the linear kinds have no place for.
_SOFTMAX_ONLY = ("attention_biases", "rel_pos_h", "rel_pos_w")


def from_torch(model: Backbone, state_dict: Mapping[str, np.ndarray]) -> Variables:
    """Variables for `model` from a state dict under timm 1.0's names.

    A position embedding, attention biases or relative positions of another image size are fitted to the model's. What
    timm does not have, the token kernels, starts at zero, as in a new model, and is listed in a warning of this
    module's logger; so is what a linear_angular or angular model has no use for, the biases of the softmax.

    Args:
      model: in training form; its parameters are not used, only their paths and shapes.
      state_dict: names to arrays, [out, in] and [out, in, height, width] as in PyTorch.

    Returns:
      {"params": ...}, and "batch_stats" with batch norm, of float arrays in the model's dtypes.

    Raises:
      InputError: the model is in inference form, a name is missing or unknown, or a shape does not fit.
    """
    _check_form(model)
    remaining = {name: np.asarray(value) for name, value in state_dict.items() if name.split(".")[-1] not in _IGNORED}
    leaves, at_zero, unused = {}, [], []
    for path, leaf in flatten(get_variables(model)).items():
        name = _torch_name(path)
        if name in remaining:
            value, shape = remaining.pop(name), _torch_shape(path, leaf.shape)
            if path == "params/pos_embed":
                value = _fit_position_embedding(model, value)
            elif path.endswith(("/rel_pos_h", "/rel_pos_w")) and value.ndim == 2 and value.shape[0] % 2 == 1:
                value = np.asarray(resize_relative_positions(jnp.asarray(value), shape[0]))
            elif path.endswith("/attention_biases"):
                value = _fit_attention_biases(value, leaf.shape)
            if value.shape != shape:
                raise InputError(f"{name!r} must be of the shape {shape} to fit the model, not {value.shape}.")
            order = _row_order(model, path)
            value = value if order is None else value[order]
            leaves[path] = jnp.asarray(_from_torch_layout(path, value, leaf.ndim), leaf.dtype)
        elif path.endswith("/token_kernel"):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            at_zero.append(path)
        else:
            raise InputError(f"the state dict lacks {name!r}, which {model.spec.name} needs for {path!r}.")
    if model.spec.attention in ("linear_angular", "angular"):
        unused = sorted(name for name in remaining if name.split(".")[-1] in _SOFTMAX_ONLY)
    if unknown := sorted(remaining.keys() - unused):
        raise InputError(f"the state dict holds {unknown[0]!r}, which {model.spec.name} does not have.")
    if at_zero:
        logging.getLogger(__name__).warning(
            "%d token kernels are not in the state dict and start at zero, as in a new model: %s",
            len(at_zero),
            ", ".join(at_zero),
        )
    if unused:
        logging.getLogger(__name__).warning(
            "%d arrays of the state dict are of the softmax alone and are left out: %s", len(unused), ", ".join(unused)
        )
    return unflatten(leaves)


def to_torch(model: Backbone, variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: timm 1.0's names to float32 numpy arrays.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    _check_form(model)
    check_variables(model, variables)
    state_dict = {}
    for path, leaf in flatten(variables).items():
        value, order = _to_torch_layout(path, np.asarray(leaf, np.float32)), _row_order(model, path)
        state_dict[_torch_name(path)] = value if order is None else value[np.argsort(order)]
    return state_dict


def _check_form(model: Backbone) -> None:
    if model.spec.form != "train":
        raise InputError('a model in inference form is folded: convert with form="train", then use to_inference.')


def _torch_name(path: str) -> str:
    _, *modules, leaf = path.split("/")
    modules = [module for module in modules if module != SOFTMAX_BRANCH]
    return ".".join([*modules, _LEAF_NAMES.get(leaf, leaf)])


def _row_order(model: Backbone, path: str) -> np.ndarray | None:
    """Which of timm's rows each of ours is, where the two are ordered differently: LeViT's fused projections.

    Ours are ordered q, k, v, then head; timm's head first, then q, k, v.
    """
    modules = path.split("/")[1:]
    fused = {"qkv", "kv"} & set(modules)
    if not isinstance(model, LeViT) or not fused:
        return None
    attention: Any = model
    for name in modules[: modules.index(fused.pop())]:
        attention = attention[int(name)] if name.isdigit() else getattr(attention, name)
    rows = np.arange(attention.num_heads * sum(attention.fused_dims)).reshape(attention.num_heads, -1)
    parts = np.split(rows, np.cumsum(attention.fused_dims)[:-1], axis=1)
    return np.concatenate([part.ravel() for part in parts])


def _from_torch_layout(path: str, value: np.ndarray, ndim: int) -> np.ndarray:
    if path.endswith("/token_kernel"):  # [heads, 1, taps, 1], or [heads, 1, rows, columns]
        taps = value[:, 0].transpose(1, 2, 0)
        return taps[:, 0] if ndim == 2 else taps
    if path.endswith("/kernel"):
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(path, np.empty(shape, np.bool_)).shape


def _to_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("/token_kernel"):
        taps = value[:, None] if value.ndim == 2 else value
        return taps.transpose(2, 0, 1)[:, None]
    if path.endswith("/kernel"):
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value


def _fit_position_embedding(model: Any, embedding: np.ndarray) -> np.ndarray:
    """The embedding on the model's grid, where it is one of a square grid at all."""
    if embedding.ndim != 3 or embedding.shape[0] != 1 or embedding.shape[1] <= model.prefix_tokens:
        return embedding
    side = math.isqrt(embedding.shape[1] - model.prefix_tokens)
    return np.asarray(resize_position_embedding(jnp.asarray(embedding), (side, side), model.grid, model.prefix_tokens))


def _fit_attention_biases(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """LeViT's biases for the model's grid, where they are those of a square grid at all."""
    if table.ndim != 2 or math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        return table
    side, new_side = math.isqrt(table.shape[1]), math.isqrt(shape[1])
    return fit_bias_table(table, (side, side), (new_side, new_side))
