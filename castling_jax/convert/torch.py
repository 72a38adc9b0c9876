"""Converts between our variables and PyTorch state dicts under timm 1.0's parameter names.

Our modules have timm's names, so a path joined with dots is timm's name; only the leaves differ in name and layout, and
timm has no level for a castling model's `softmax_branch`. timm has no token kernel either; its name is the one in the
paper authors' block.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.convert.inference import SOFTMAX_BRANCH
from castling_jax.convert.names import listed, timm_state_dict
from castling_jax.errors import InputError, check, printable, takes
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.levit import fit_bias_table
from castling_jax.models.mae import MAE
from castling_jax.models.model import Model
from castling_jax.models.mvitv2 import MViTv2
from castling_jax.models.position import resize_position_embedding, resize_relative_positions
from castling_jax.models.variables import MODEL, VARIABLES, Variables, flatten, get_variables, leaves_of, unflatten

_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "token_kernel": "dconv.weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Parameters of a bias of the scores, which only some kinds of attention take.
_SOFTMAX_ONLY = ("attention_biases", "rel_pos_h", "rel_pos_w")
_TAPS = ("/token_kernel",)  # timm has no such parameter
_POOLS = tuple(f"/pool_{part}/kernel" for part in "qkv")  # timm has these in MViTv2, but not in a DeiT
# What reset_head starts anew.
_HEADS = ("head", "head_dist", "fc_norm")
# A masked autoencoder's arrays beside its encoder's, under its authors' names.
_DECODER = ("mask_token", "decoder_")
# Factors of a layer's output in DeiT III, CaiT and BEiT, under timm's, the authors' and Hugging Face's names.
_LAYER_SCALE = re.compile(r"(^|\.)(ls[12]?\.gamma|gamma_[12]|lambda_[12]|layer_scale[12]?\.\w+)$")


@takes(model=MODEL)
def from_torch(
    model: Model,
    state_dict: Mapping[str, Any],
    *,
    reset_head: bool = False,
    ema: bool | None = None,
    source: Model | None = None,
) -> Variables:
    """Variables for `model` from a state dict under timm 1.0's names, or others that `read_state_dict` translates.

    Position embeddings, attention biases and relative positions for another image size are resized to the model's.
    Parameters that timm does not have, token kernels and the kernels of DeiT's `qkv_pool`, start at zero as in a new
    model, and a warning of this module's logger lists them. Another warning lists the biases of the softmax that are
    left out because the model's attention takes no bias of the scores. A masked autoencoder's decoder is left out too,
    unless the model is one.

    Args:
      model: the model, in training form; only the paths and shapes of its parameters are used.
      state_dict: names -> NumPy, JAX or PyTorch arrays in PyTorch's layouts, [out, in] and [out, in, height, width].
        All names may have a prefix, and the state dict may be inside a dict under "model" or "state_dict", as training
        scripts save it.
      reset_head: whether classifiers that are missing, or have another number of classes, start at zero: without a
        preference for any class.
      ema: for a dict with both, whether to read the moving average instead of the raw weights. None reads the raw
        weights, and a warning says so.
      source: the model that the weights belong to, which knows the grids of their position embeddings and attention
        biases. If None, tables of the model's size are taken to be for the model's grid, and others for a square one.

    Returns:
      {"params": ...}, and "batch_stats" for a model with batch norm: copies, float arrays in the model's dtypes.

    Raises:
      InputError: the model is in inference form; `source` is no model; the state dict is no mapping, or holds no
        weights or several sets of weights; names are missing or unknown; shapes do not fit; or arrays are not finite
        floating-point numbers. The message lists the arrays.
    """
    check_form(model)
    check(isinstance(source, nnx.Module | None), f"source must be a model or None, not {type(source).__name__}.")
    logger = logging.getLogger(__name__)
    remaining = timm_state_dict(state_dict, "a state dict", ema=ema)
    if not isinstance(model, MAE) and (decoder := [name for name in remaining if name.startswith(_DECODER)]):
        # Fine-tuning a masked autoencoder drops its decoder: there is nothing to warn of.
        logger.info("%d arrays of a masked autoencoder's decoder are left out.", len(decoder))
        remaining = {name: value for name, value in remaining.items() if name not in decoder}
    leaves: dict[str, jax.Array] = {}
    missing, misshapen, at_zero, unused, replaced = [], [], [], [], []
    taken: dict[str, np.ndarray] = {}
    at_zero_here = _TAPS + _POOLS * ("qkv_pool" in dict(model.spec.overrides))
    # MViTv2's feature maps are taken before its last norm, so that a detector's backbone has no such norm.
    heads = (*_HEADS, "norm") if isinstance(model, MViTv2) else _HEADS
    old_grids, new_grids = {} if source is None else _grids(source), _grids(model)
    for path, leaf in flatten(get_variables(model)).items():
        name, shape = _torch_name(model, path), _torch_shape(path, leaf.shape)
        value = remaining.pop(name, None)
        old_grid, new_grid = old_grids.get(name), new_grids.get(name)
        fitted = value
        if value is not None and (value.shape != shape or old_grid not in (None, new_grid)):
            fitted = _fit(model, path, value, leaf.shape, old_grid, new_grid)
        if value is not None and fitted is not None and fitted.shape == shape:
            taken[name] = value
            order = _row_order(model, path)
            fitted = fitted if order is None else fitted[order]
            # A copy: on a CPU, asarray may share memory with a torch model that is still training.
            leaves[path] = jnp.array(_from_torch_layout(path, fitted, leaf.ndim), leaf.dtype)
        elif value is None and path.endswith(at_zero_here):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            at_zero.append(path)
        elif reset_head and name.split(".")[0] in heads:
            leaves[path] = (jnp.ones if path.endswith(("/scale", "/var")) else jnp.zeros)(leaf.shape, leaf.dtype)
        elif value is None:
            missing.append(repr(name))
        else:
            misshapen.append(f"{name!r} is {value.shape}, not {shape}")
    # Without a place for a bias of the scores, the state dict's tables are expected leftovers, not unknown names.
    if KINDS[model.spec.attention].tables is None:
        unused = sorted(name for name in remaining if name.split(".")[-1] in _SOFTMAX_ONLY)
    if reset_head and dict(model.spec.overrides).get("global_pool") == "avg":
        replaced = sorted(name for name in remaining if name.startswith("norm."))
    unknown = [repr(name) for name in sorted(remaining.keys() - {*unused, *replaced})]
    check_fit(model.spec.name, missing, unknown, misshapen, _hints(model, unknown, misshapen))
    check_weights(taken)
    if replaced:
        logger.info("The encoder's last norm (%s) is left out: fc_norm takes its place.", ", ".join(replaced))
    if at_zero:
        logger.warning(
            "%d token kernels are not in the state dict and start at zero, as in a new model: %s",
            len(at_zero),
            ", ".join(at_zero),
        )
    if unused:
        logger.warning(
            "%d arrays of the state dict belong to the softmax alone and are left out: %s",
            len(unused),
            printable(", ".join(unused)),
        )
    return unflatten(leaves)


def _hints(model: Model, unknown: list[str], misshapen: list[str]) -> list[str]:
    """Likely reasons why names or shapes do not fit a classifier."""
    hints, name = [], model.spec.name
    has_taps = any(path.endswith(_TAPS) for path in flatten(get_variables(model)))
    if not has_taps and any(text.endswith(".dconv.weight'") for text in unknown):
        hints.append(f"dconv.weight is a token kernel, which attention={model.spec.attention!r} does not have")
    if scales := [text for text in unknown if _LAYER_SCALE.search(text.strip("'"))]:
        hints.append(f"{scales[0]} belongs to layer scale, which DeiT III has and {name} does not")
    if any(text.startswith("'head") for text in misshapen):
        hints.append("reset_head=True starts classifiers of another number of classes anew")
    return hints


def check_fit(name: str, missing: list[str], unknown: list[str], misshapen: list[str], hints: list[str]) -> None:
    """Raises an InputError that lists everything in a state dict that does not fit the model."""
    parts = [f"it lacks {len(missing)} of the model's tensors: {listed(missing)}"] if missing else []
    parts += [f"it holds {len(unknown)} that {name} does not have: {listed(unknown)}"] if unknown else []
    parts += [f"it holds {len(misshapen)} of another shape: {listed(misshapen)}"] if misshapen else []
    if parts:
        raise InputError(f"the state dict does not fit {name}: {'; '.join([*parts, *hints])}.")


def check_weights(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises an InputError unless all arrays of a state dict hold finite floating-point numbers."""
    if unusable := [text for name, value in arrays.items() for text in _unusable(name, value)]:
        raise InputError(f"the state dict holds {len(unusable)} arrays that are no weights: {listed(unusable)}.")


def _unusable(name: str, value: np.ndarray) -> list[str]:
    """Why an array cannot be a weight, as a list of one text; an empty list if it can."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return [f"{name!r} is of {value.dtype}, not floating"]
    count = int(np.sum(~np.isfinite(value)))
    return [f"{name!r} has {count} of {value.size} numbers that are not finite"] if count else []


@takes(model=MODEL, variables=VARIABLES)
def to_torch(model: Model, variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: timm 1.0's names -> float32 numpy arrays, which are copies.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    check_form(model)
    return _state_dict(model, leaves_of(model, variables))


def backbone_to_torch(model: Any, variables: Variables) -> dict[str, np.ndarray]:
    """The weights of a model's backbone alone, as `to_torch` gives those of the classifier, but without its head.

    `model` is a model on a backbone, in training form.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    check_form(model)
    leaves = leaves_of(model, variables)
    own = {name.replace("/backbone/", "/", 1): leaves[name] for name in leaves if name.split("/")[1] == "backbone"}
    return _state_dict(model.backbone, own)


def _state_dict(model: Any, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """timm's names -> arrays for variables of a model, all or some, which are given by path."""
    state_dict = {}
    for path, leaf in leaves.items():
        value, order = _to_torch_layout(path, np.asarray(leaf, np.float32)), _row_order(model, path)
        value = value if order is None else value[np.argsort(order)]
        # Contiguous, because safetensors writes the memory of a transposed view in its original order.
        state_dict[_torch_name(model, path)] = np.array(value, order="C")
    return state_dict


def check_form(model: Model) -> None:
    """Raises an InputError unless the model is in training form."""
    if model.spec.form != "train":
        raise InputError('a model in inference form is folded: convert with form="train", then use to_inference.')


def _torch_name(model: Model, path: str) -> str:
    _, *modules, leaf = path.split("/")
    # In its authors' names, a masked autoencoder's encoder has no level of its own.
    left_out = (SOFTMAX_BRANCH, "backbone") if isinstance(model, MAE) else (SOFTMAX_BRANCH,)
    modules = [module for module in modules if module not in left_out]
    return ".".join([*modules, _LEAF_NAMES.get(leaf, leaf)])


def _row_order(model: Model, path: str) -> np.ndarray | None:
    """For LeViT's fused projections: the index of timm's row for each of our rows. None for other parameters.

    Our rows are ordered by q, k, v first and then by head; timm's by head first and then by q, k, v.
    """
    modules = path.split("/")[1:]
    fused = {"qkv", "kv"} & set(modules)
    if not fused:
        return None
    attention = _module_at(model, modules[: modules.index(fused.pop())])
    if not hasattr(attention, "fused_dims"):  # not LeViT's; the model itself may be one on a LeViT
        return None
    rows = np.arange(attention.num_heads * sum(attention.fused_dims)).reshape(attention.num_heads, -1)
    parts = np.split(rows, np.cumsum(attention.fused_dims)[:-1], axis=1)
    return np.concatenate([part.ravel() for part in parts])


def _module_at(model: Any, names: list[str]) -> Any:
    for name in names:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


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


def _grids(model: Any) -> dict[str, tuple[int, int]]:
    """The grid (height, width) of each of a model's tables of positions, by the table's name under timm's names."""
    grids = {}
    for path in flatten(get_variables(model)):
        if path.endswith("pos_embed"):
            grids[_torch_name(model, path)] = getattr(model, "backbone", model).grid
        elif path.endswith("/attention_biases"):
            modules = [name for name in path.split("/")[1:-1] if name != SOFTMAX_BRANCH]
            grids[_torch_name(model, path)] = _module_at(model, modules).table_grid
    return grids


def _fit(
    model: Any,
    path: str,
    value: np.ndarray,
    shape: tuple[int, ...],
    old_grid: tuple[int, int] | None,
    new_grid: tuple[int, int] | None,
) -> np.ndarray:
    """Resizes a table of positions to the model's grid; other arrays stay as they are.

    Args:
      model: the model.
      path: the table's path.
      value: the table for another grid.
      shape: the table's shape in the model.
      old_grid: the grid that the table is for; None means a square one.
      new_grid: the model's grid; None where the table has none.
    """
    if path.endswith(("/rel_pos_h", "/rel_pos_w")) and value.ndim == 2 and value.shape[0] % 2 == 1:
        # Each axis has a table of its own, whose length is all that resizing needs.
        return np.asarray(resize_relative_positions(jnp.asarray(value), shape[0]))
    if new_grid is None or value.ndim < 2:
        return value
    is_embedding = path.endswith("pos_embed")
    prefix = getattr(model, "backbone", model).prefix_tokens if is_embedding else 0
    side = math.isqrt(max(value.shape[1] - prefix, 0))
    height, width = grid = old_grid or (side, side)
    if height * width == 0 or height * width != value.shape[1] - prefix:
        return value
    if is_embedding and value.ndim == 3 and value.shape[0] == 1:
        return np.asarray(resize_position_embedding(jnp.asarray(value), grid, new_grid, prefix))
    if not is_embedding and value.ndim == 2:
        return fit_bias_table(value, grid, new_grid)
    return value
