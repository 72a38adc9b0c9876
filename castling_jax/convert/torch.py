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
from castling_jax.models.position import resize_position_embedding, resize_relative_positions
from castling_jax.models.variables import Variables, check_variables, flatten, get_variables, unflatten
from castling_jax.ops.errors import InputError

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "token_kernel": "dconv.weight"}


def from_torch(model: Backbone, state_dict: Mapping[str, np.ndarray]) -> Variables:
    """Variables for `model` from a state dict under timm 1.0's names.

    Position embeddings and relative positions of another image size are resized to the model's. What timm does not
    have, a castling model's token kernels, starts at zero, as in a new model, and is listed in a warning of this
    module's logger.

    Args:
      model: in training form; its parameters are not used, only their paths and shapes.
      state_dict: names to arrays, [out, in] and [out, in, height, width] as in PyTorch.

    Returns:
      {"params": ...} of float arrays in the model's param_dtype.

    Raises:
      InputError: the model is in inference form, a name is missing or unknown, or a shape does not fit.
    """
    _check_form(model)
    remaining = {name: np.asarray(value) for name, value in state_dict.items()}
    leaves, at_zero = {}, []
    for path, leaf in flatten(get_variables(model)).items():
        name = _torch_name(path)
        if name in remaining:
            value, shape = remaining.pop(name), _torch_shape(path, leaf.shape)
            if path == "params/pos_embed":
                value = _fit_position_embedding(model, value)
            elif path.endswith(("/rel_pos_h", "/rel_pos_w")) and value.ndim == 2 and value.shape[0] % 2 == 1:
                value = np.asarray(resize_relative_positions(jnp.asarray(value), shape[0]))
            if value.shape != shape:
                raise InputError(f"{name!r} must be of the shape {shape} to fit the model, not {value.shape}.")
            leaves[path] = jnp.asarray(_from_torch_layout(path, value, leaf.ndim), leaf.dtype)
        elif path.endswith("/token_kernel"):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            at_zero.append(path)
        else:
            raise InputError(f"the state dict lacks {name!r}, which {model.spec.name} needs for {path!r}.")
    if remaining:
        raise InputError(f"the state dict holds {sorted(remaining)[0]!r}, which {model.spec.name} does not have.")
    if at_zero:
        logging.getLogger(__name__).warning(
            "%d token kernels are not in the state dict and start at zero, as in a new model: %s",
            len(at_zero),
            ", ".join(at_zero),
        )
    return unflatten(leaves)


def to_torch(model: Backbone, variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: timm 1.0's names to float32 numpy arrays.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    _check_form(model)
    check_variables(model, variables)
    return {
        _torch_name(path): _to_torch_layout(path, np.asarray(leaf, np.float32))
        for path, leaf in flatten(variables).items()
    }


def _check_form(model: Backbone) -> None:
    if model.spec.form != "train":
        raise InputError('a model in inference form is folded: convert with form="train", then use to_inference.')


def _torch_name(path: str) -> str:
    _, *modules, leaf = path.split("/")
    modules = [module for module in modules if module != SOFTMAX_BRANCH]
    return ".".join([*modules, _LEAF_NAMES.get(leaf, leaf)])


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
