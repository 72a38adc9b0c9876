"""Between our variables and PyTorch state dicts under timm 1.0's parameter names.

Our modules carry timm's names, so a path becomes a name by joining it with dots; only a leaf's own name and layout
differ, and a castling model's `softmax_branch` is no level in timm. The token kernel, which timm does not have, is
named as in the paper authors' block.
"""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file as load_safetensors

from castling_jax.convert.inference import SOFTMAX_BRANCH
from castling_jax.errors import InputError, refusing
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.backbone import Backbone
from castling_jax.models.levit import LeViT, fit_bias_table
from castling_jax.models.position import resize_position_embedding, resize_relative_positions
from castling_jax.models.variables import Variables, check_variables, flatten, get_variables, unflatten

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
# What a bias of the scores is made of; only some kinds of attention take one.
_SOFTMAX_ONLY = ("attention_biases", "rel_pos_h", "rel_pos_w")
_WRAPPERS = ("model", "state_dict", "model_ema")  # under one of these, checkpoints of a training keep the weights
_LISTED = 6  # names that a refusal gives; the rest is counted


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights in a safetensors file, in NumPy's .npz, or in a PyTorch file (.pth, .pt, .bin), for `from_torch`.

    A PyTorch file is read with weights_only=True, so that no code in it is run, and needs torch. Where its weights
    stand under "model", "state_dict" or "model_ema", as in DeiT's and timm's checkpoints, they are taken from there.

    Returns:
      Names to arrays; floating-point ones in float32, whatever they were stored in.

    Raises:
      InputError: there is no such file, it is damaged or holds no weights, or torch is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file '{path}' to read weights from.")
    tensors = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix, _read_torch)(path)
    return {name: x.astype(np.float32) if jnp.issubdtype(x.dtype, np.floating) else x for name, x in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with refusing(SafetensorError, f"'{path}' is damaged or no safetensors file"):
        return {name: np.asarray(value) for name, value in load_safetensors(path).items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    no_npz = refusing(Exception, f"'{path}' is damaged or no .npz file")  # zipfile, zlib and numpy raise many kinds
    with no_npz, np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    for name, value in arrays.items():
        if value.dtype.kind not in "fiub":
            raise InputError(f"'{path}' holds {name!r} of dtype {value.dtype}, which is not one of numbers.")
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"'{path}' is read with torch, which is not installed: install it (pip install torch), or store the "
            "weights as .safetensors."
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise many kinds
        said = (str(error) or repr(error)).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(f"'{path}' is damaged, or holds other things than weights: {said}.") from error
    for key in _WRAPPERS:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise InputError(f"'{path}' holds no weights: it must be a dict of tensors, or have one under {_WRAPPERS}.")
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in tensors.items()}


def from_torch(model: Backbone, state_dict: Mapping[str, np.ndarray], *, reset_head: bool = False) -> Variables:
    """Variables for `model` from a state dict under timm 1.0's names.

    A position embedding, attention biases or relative positions of another image size are fitted to the model's. What
    timm does not have, the token kernels, starts at zero, as in a new model, and is listed in a warning of this
    module's logger. So are the biases of the softmax, where the model's attention does not take a bias of the scores.

    Args:
      model: in training form; its parameters are not used, only their paths and shapes.
      state_dict: names to arrays, [out, in] and [out, in, height, width] as in PyTorch.
      reset_head: whether classifiers that are missing or of another number of classes start anew, at zero: with no
        preference for any class.

    Returns:
      {"params": ...}, and "batch_stats" with batch norm, of float arrays in the model's dtypes; copies.

    Raises:
      InputError: the model is in inference form, the state dict is no mapping, or names are missing or unknown or
        shapes do not fit: it lists them.
    """
    _check_form(model)
    if not isinstance(state_dict, Mapping):
        raise InputError(f"a state dict must be a dict of names to arrays, not {type(state_dict).__name__}.")
    remaining = {name: np.asarray(value) for name, value in state_dict.items() if name.split(".")[-1] not in _IGNORED}
    leaves: dict[str, jax.Array] = {}
    missing, misshapen, at_zero, unused = [], [], [], []
    for path, leaf in flatten(get_variables(model)).items():
        name, shape = _torch_name(path), _torch_shape(path, leaf.shape)
        value = remaining.pop(name, None)
        fitted = value if value is None or value.shape == shape else _fit(model, path, value, leaf.shape)
        if fitted is not None and fitted.shape == shape:
            order = _row_order(model, path)
            fitted = fitted if order is None else fitted[order]
            # A copy: on a CPU asarray may share memory with a torch model that goes on being trained.
            leaves[path] = jnp.array(_from_torch_layout(path, fitted, leaf.ndim), leaf.dtype)
        elif value is None and path.endswith("/token_kernel"):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            at_zero.append(path)
        elif reset_head and name.split(".")[0] in ("head", "head_dist"):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
        elif value is None:
            missing.append(repr(name))
        else:
            misshapen.append(f"{name!r} is {value.shape}, not {shape}")
    if KINDS[model.spec.attention].tables is None:
        unused = sorted(name for name in remaining if name.split(".")[-1] in _SOFTMAX_ONLY)
    unknown = [repr(name) for name in sorted(remaining.keys() - unused)]
    if missing or unknown or misshapen:
        raise InputError(_misfit(model, missing, unknown, misshapen))
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


def _misfit(model: Backbone, missing: list[str], unknown: list[str], misshapen: list[str]) -> str:
    """All that keeps a state dict from being this model's, in one sentence."""

    def listed(found: list[str]) -> str:
        return ", ".join(found[:_LISTED]) + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")

    name = model.spec.name
    parts = [f"it lacks {len(missing)} of the model's tensors: {listed(missing)}"] if missing else []
    parts += [f"it holds {len(unknown)} that {name} does not have: {listed(unknown)}"] if unknown else []
    parts += [f"it holds {len(misshapen)} of another shape: {listed(misshapen)}"] if misshapen else []
    if any(text.startswith("'head") for text in misshapen):
        parts.append("reset_head=True starts classifiers of another number of classes anew")
    return f"the state dict does not fit {name}: {'; '.join(parts)}."


def to_torch(model: Backbone, variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: timm 1.0's names to float32 numpy arrays, which are copies.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    _check_form(model)
    check_variables(model, variables)
    state_dict = {}
    for path, leaf in flatten(variables).items():
        value, order = _to_torch_layout(path, np.asarray(leaf, np.float32)), _row_order(model, path)
        value = value if order is None else value[np.argsort(order)]
        # Contiguous, since safetensors would write a transposed view's memory as it lies.
        state_dict[_torch_name(path)] = np.array(value, order="C")
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


def _fit(model: Any, path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What is made for an image size on the model's grid, where it is that of a square grid at all; else as it is."""
    if path == "params/pos_embed" and value.ndim == 3 and value.shape[0] == 1:
        side = math.isqrt(max(value.shape[1] - model.prefix_tokens, 0))
        if side and side * side == value.shape[1] - model.prefix_tokens:
            resized = resize_position_embedding(jnp.asarray(value), (side, side), model.grid, model.prefix_tokens)
            return np.asarray(resized)
    if path.endswith(("/rel_pos_h", "/rel_pos_w")) and value.ndim == 2 and value.shape[0] % 2 == 1:
        return np.asarray(resize_relative_positions(jnp.asarray(value), shape[0]))
    if path.endswith("/attention_biases") and value.ndim == 2:
        side, new_side = math.isqrt(value.shape[1]), math.isqrt(shape[1])
        if side and side * side == value.shape[1]:
            return fit_bias_table(value, (side, side), (new_side, new_side))
    return value
