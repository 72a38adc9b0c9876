"""What others call their weights: state dicts as people have them in, timm 1.0's names and NumPy's arrays out.

A training's checkpoint keeps the weights under a key, beside an optimiser and options; a wrapper such as
torch.compile or DistributedDataParallel puts one prefix before all names; Hugging Face's ViT and DeiT have names of
their own, and big_vision's ViT has Flax's. Nothing here knows a model: whether weights fit one is torch.py's matter.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from castling_jax.errors import InputError, printable, refusing

# What timm's names, and Hugging Face's below a ViT's or a DeiT's own prefix, start with.
_TIMM = "blocks cls_token dist_token head head_dist norm patch_embed pos_embed stages stem"
_ROOTS = frozenset(_TIMM.split()) | {"embeddings", "encoder", "layernorm", "classifier", "cls_classifier"}
# Buffers that say nothing: PyTorch counts batches where no momentum is given, and models that were averaged; older
# LeViTs keep what can be computed.
_IGNORED = ("num_batches_tracked", "n_averaged", "attention_bias_idxs")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # of several state dicts one under these is the model
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
_LISTED = 6  # names that a refusal gives

_HUGGING_FACE = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"layernorm\.", "norm."),
    (r"(cls_)?classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)
# The original release numbers the modules of a block through; big_vision numbers each kind.
_BIG_VISION = (
    (r"embedding/", "patch_embed.proj."),
    (r"cls$", "cls_token"),
    (r"(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_0/", r"blocks.\1.norm1."),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/", r"blocks.\1.norm2."),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out/", r"blocks.\1.attn.proj."),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/", r"blocks.\1.attn.\2."),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/", r"blocks.\1.mlp.fc1."),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/", r"blocks.\1.mlp.fc2."),
    (r"Transformer/encoder_norm/", "norm."),
    (r"head/", "head."),
)
_PATCHES = "embedding/kernel"  # by which big_vision's are known
_STACKED = "Transformer/encoderblock/"  # all blocks in one array each, where big_vision scanned over them


def timm_state_dict(state_dict: object, what: str, *, ema: bool | None = None) -> dict[str, np.ndarray]:
    """The weights under timm 1.0's names, whatever they are wrapped in.

    Args:
      state_dict: names to arrays of NumPy, JAX or PyTorch, Parameters too; or a dict that has one such dict, or one and
        its moving average, among other things.
      what: what holds the weights, for messages.
      ema: whether the moving average is wanted. None is the raw weights where there are both, said in a warning.

    Returns:
      Names to new arrays, or NumPy's own where nothing was to be changed; floating-point ones in float32.

    Raises:
      InputError: it is no dict, it holds no weights or several, there is no average, or an array is not of numbers.
    """
    arrays = {
        name: _as_array(name, value, what)
        for name, value in _unwrapped(state_dict, what, ema).items()
        if name.split(".")[-1] not in _IGNORED
    }
    patches = [name for name in arrays if name == _PATCHES or name.endswith(f"/{_PATCHES}")]
    if patches:
        return _from_big_vision(arrays, prefix=min(patches, key=len).removesuffix(_PATCHES))
    arrays = _without_prefix(arrays)
    if any(re.match(r"((vit|deit)\.)?(embeddings|encoder\.layer)\.", name) for name in arrays):
        return _from_hugging_face(arrays, what)
    return arrays


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


# Wrappings


def _unwrapped(source: object, what: str, ema: bool | None) -> Mapping[str, Any]:
    """The dict of arrays in a dict of other things."""
    if not isinstance(source, Mapping):
        raise InputError(f"{what} must be a dict of names to arrays, not {_class(source)}.")
    if any(_is_array(value) for value in source.values()) or not source:
        for name, value in source.items():
            if not isinstance(name, str) or not _is_array(value):
                raise InputError(f"{what} holds {_class(value)} under {name!r}, among arrays that have names.")
        found = {"": source}
    else:
        found = _state_dicts(source)
    averages = [key for key in found if _AVERAGE.search(key)]
    raw = [key for key in found if key not in averages]
    if len(raw) > 1 and "" not in raw:
        raw = [key for key in raw if key in _WRAPPERS] or raw
    chosen = averages if ema or (ema is None and not raw) else raw
    keys = f"its keys are {listed([str(key) for key in source])}"
    if not found:
        classes = sorted({_class(value) for value in source.values() if not isinstance(value, _PLAIN)})
        others = f", and it holds {listed(classes)}" if classes else ""
        raise InputError(f"{what} holds no weights: {keys}{others}.")
    if not chosen:
        missing = "moving average" if ema else "weights but a moving average"
        raise InputError(f"{what} holds no {missing}" + ("." if "" in found else f": {keys}."))
    if len(chosen) > 1:
        raise InputError(f"{what} holds {len(chosen)} state dicts, {listed(chosen)}: give one of them alone; {keys}.")
    if ema is None and raw and averages:
        logging.getLogger(__name__).warning(
            "%s holds weights under '%s' and their moving average under '%s': the former are read; ema=True reads the "
            "average.",
            *map(printable, (what, raw[0], averages[0])),
        )
    return found[chosen[0]]


_PLAIN = (Mapping, list, tuple, str, bytes, int, float, type(None))


def _state_dicts(source: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """Those in a dict, by their key, or by their path where they lie deeper; an optimiser's arrays are none."""
    inner = {str(key): value for key, value in source.items() if isinstance(value, Mapping)}
    inner = {key: value for key, value in inner.items() if "optim" not in key.lower()}
    found = {key: value for key, value in inner.items() if any(map(_is_array, value.values()))}
    whole = {
        key: value
        for key, value in found.items()
        if all(isinstance(name, str) and _is_array(array) for name, array in value.items())
    }
    if whole:
        return whole
    return {
        f"{key}.{below}": state_dict
        for key, value in inner.items()
        for below, state_dict in _state_dicts(value).items()
    }


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _class(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _as_array(name: str, value: Any, what: str) -> np.ndarray:
    if hasattr(value, "detach"):  # PyTorch's; NumPy knows neither its bfloat16 nor its float8
        with refusing(Exception, f"{what} holds {name!r}, whose numbers cannot be had"):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
    value = np.asarray(value)
    if value.dtype.kind == "V" and value.dtype.names is None and value.dtype.itemsize == 2:
        value = value.view(ml_dtypes.bfloat16)  # NumPy's files forget the type
    if jnp.issubdtype(value.dtype, np.floating):
        with np.errstate(over="ignore"):  # whoever takes infinity for a weight says so
            return value.astype(np.float32, copy=False)
    if value.dtype.kind not in "iub":
        raise InputError(f"{what} holds {name!r} of dtype {value.dtype}, which is not one of numbers.")
    return value


# Names


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what stands before all names, such as module., if timm's or Hugging Face's names are behind it."""
    stripped = arrays
    while not any(name.split(".")[0] in _ROOTS for name in stripped):
        if len({name.partition(".")[0] for name in stripped}) != 1 or not all("." in name for name in stripped):
            return arrays
        stripped = {name.partition(".")[2]: value for name, value in stripped.items()}
    return stripped


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def _from_hugging_face(arrays: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    arrays = {re.sub(r"^(vit|deit)\.", "", name): value for name, value in arrays.items()}
    if poolers := [name for name in arrays if name.startswith("pooler.")]:  # which no classifier reads
        logging.getLogger(__name__).warning("%s holds a pooler, which is left out.", printable(what))
        arrays = {name: value for name, value in arrays.items() if name not in poolers}
    return _with_fused_qkv({_renamed(name, _HUGGING_FACE): value for name, value in arrays.items()})


def _from_big_vision(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Flax's layouts, [in, out] and [height, width, in, out], with the heads an axis of their own."""
    # Names without the prefix are an optimiser's.
    arrays = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    for name in [name for name in arrays if name.startswith(_STACKED)]:
        for block, value in enumerate(arrays.pop(name)):
            arrays[name.replace(_STACKED, f"{_STACKED[:-1]}_{block}/")] = value
    renamed = {}
    for name, value in arrays.items():
        new = re.sub(r"\.(kernel|scale)$", ".weight", _renamed(name, _BIG_VISION))
        renamed[new] = _torch_layout(new, value) if new != name else value
    tokens = renamed["pos_embed"].shape[1] if "pos_embed" in renamed and renamed["pos_embed"].ndim == 3 else 0
    if "cls_token" in renamed and tokens and math.isqrt(tokens) ** 2 == tokens:
        # big_vision adds positions before the class token comes, which so has none.
        renamed["pos_embed"] = np.pad(renamed["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    return _with_fused_qkv(renamed)


def _torch_layout(name: str, value: np.ndarray) -> np.ndarray:
    """An array of big_vision's, whose new name this is, as PyTorch has it; one of unlikely shape as it is."""
    if name.endswith((".query.bias", ".key.bias", ".value.bias")):
        return value.reshape(-1)
    if name.endswith((".query.weight", ".key.weight", ".value.weight")) and value.ndim == 3:
        return value.reshape(value.shape[0], -1).T
    if name.endswith(".attn.proj.weight") and value.ndim == 3:
        return value.reshape(-1, value.shape[2]).T
    if name.endswith(".weight") and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if name.endswith(".weight") and value.ndim == 2 else value


def _with_fused_qkv(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Queries', keys' and values' rows as one projection, where all three are there."""
    arrays = dict(arrays)
    for name in [name for name in arrays if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in arrays and arrays[part].shape[1:] == arrays[name].shape[1:] for part in parts):
            arrays[name.replace(".query.", ".qkv.")] = np.concatenate([arrays.pop(part) for part in parts])
    return arrays
