"""Other projects' names of weights: their state dicts in, timm 1.0's names and NumPy arrays out.

A training checkpoint keeps the weights under a key, beside an optimiser and options; a wrapper such as torch.compile or
DistributedDataParallel puts a prefix before all names; Hugging Face's ViT and DeiT have names of their own, and
big_vision's ViT has Flax's. Nothing here depends on a model: torch.py checks whether weights fit one.
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

# First parts of timm's names, and of Hugging Face's names without the prefix `vit.` or `deit.`.
_TIMM = "blocks cls_token dist_token head head_dist norm patch_embed pos_embed stages stem"
_ROOTS = frozenset(_TIMM.split()) | {"embeddings", "encoder", "layernorm", "classifier", "cls_classifier"}
# Buffers that carry no weights: PyTorch counts the batches of batch norm and the models in an average, and older
# LeViTs store indices that can be computed.
_IGNORED = ("num_batches_tracked", "n_averaged", "attention_bias_idxs")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # of several state dicts, the model's has such a key
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
_LISTED = 6  # names that an error message lists

_HUGGING_FACE = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    *(
        (rf"{layers}\.(\d+)\.{theirs}\.", rf"{blocks}.\1.{ours}.")
        for layers, blocks in ((r"encoder\.layer", "blocks"), (r"decoder\.decoder_layers", "decoder_blocks"))
        for theirs, ours in (
            (r"attention\.attention\.(query|key|value)", r"attn.\2"),
            (r"attention\.output\.dense", "attn.proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        )
    ),
    (r"decoder\.(?=mask_token|decoder_)", ""),  # ViTMAE's decoder
    (r"layernorm\.", "norm."),
    (r"(cls_)?classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)
# The original ViT release numbers all modules of a block together; big_vision numbers each kind separately.
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
_PATCHES = "embedding/kernel"  # a name by which big_vision's weights are recognised
_STACKED = "Transformer/encoderblock/"  # a model that scans over its blocks stacks each array of all blocks


def state_arrays(state_dict: object, what: str, *, ema: bool | None = None) -> dict[str, np.ndarray]:
    """The weights under the names that they have, without their wrappers.

    Args:
      state_dict: names -> NumPy, JAX or PyTorch arrays (also Parameters); or a dict that contains one such dict, or
        one and its moving average, among other things.
      what: name of the source of the weights, for messages.
      ema: whether to return the moving average. None returns the raw weights; if there are both, a warning says so.

    Returns:
      Names -> NumPy arrays, with floating-point arrays in float32. A NumPy array that needs no change is not copied.

    Raises:
      InputError: it is no dict, it holds no weights or several sets of weights, there is no moving average, or an array
        does not hold numbers.
    """
    return {
        name: _as_array(name, value, what)
        for name, value in _unwrapped(state_dict, what, ema).items()
        if name.split(".")[-1] not in _IGNORED
    }


def timm_state_dict(state_dict: object, what: str, *, ema: bool | None = None) -> dict[str, np.ndarray]:
    """`state_arrays` under timm 1.0's names."""
    arrays = state_arrays(state_dict, what, ema=ema)
    patches = [name for name in arrays if name == _PATCHES or name.endswith(f"/{_PATCHES}")]
    if patches:
        return _from_big_vision(arrays, prefix=min(patches, key=len).removesuffix(_PATCHES))
    arrays = _without_prefix(arrays)
    if any(re.match(r"((vit|deit)\.)?(embeddings|encoder\.layer)\.", name) for name in arrays):
        return _from_hugging_face(arrays, what)
    return arrays


def listed(names: list[str]) -> str:
    """The first names of a list, and the number of the others, as a string."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


# Wrappings


def _unwrapped(source: object, what: str, ema: bool | None) -> Mapping[str, Any]:
    """Finds the dict of arrays that is meant, in `source` or in the dicts inside it."""
    if not isinstance(source, Mapping):
        raise InputError(f"{what} must be a dict of names to arrays, not {_class(source)}.")
    if any(_is_array(value) for value in source.values()) or not source:
        for name, value in source.items():
            if not isinstance(name, str) or not _is_array(value):
                raise InputError(f"{what} holds {_class(value)} under {name!r}, among arrays that have names.")
        state_dicts = {"": source}
    else:
        state_dicts = _state_dicts(source)
    averages = [key for key in state_dicts if _AVERAGE.search(key)]
    raw = [key for key in state_dicts if key not in averages]
    if len(raw) > 1 and "" not in raw:
        raw = [key for key in raw if key in _WRAPPERS] or raw
    # A file with nothing but an average needs no decision from the caller.
    wanted = averages if ema or (ema is None and not raw) else raw
    keys = f"its keys are {listed([str(key) for key in source])}"
    if not state_dicts:
        classes = sorted({_class(value) for value in source.values() if not isinstance(value, _PLAIN)})
        others = f", and it holds {listed(classes)}" if classes else ""
        raise InputError(f"{what} holds no weights: {keys}{others}.")
    if not wanted:
        missing = "moving average" if ema else "weights but a moving average"
        raise InputError(f"{what} holds no {missing}" + ("." if "" in state_dicts else f": {keys}."))
    if len(wanted) > 1:
        raise InputError(f"{what} holds {len(wanted)} state dicts, {listed(wanted)}: give one of them alone; {keys}.")
    if ema is None and raw and averages:
        logging.getLogger(__name__).warning(
            "%s holds weights under '%s' and their moving average under '%s': the former are read; ema=True reads the "
            "average.",
            *map(printable, (what, raw[0], averages[0])),
        )
    return state_dicts[wanted[0]]


_PLAIN = (Mapping, list, tuple, str, bytes, int, float, type(None))


def _state_dicts(source: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """key -> state dict for the dicts in a dict, or path -> state dict for deeper ones; optimisers are left out."""
    inner = {str(key): value for key, value in source.items() if isinstance(value, Mapping)}
    inner = {key: value for key, value in inner.items() if "optim" not in key.lower()}
    with_arrays = {key: value for key, value in inner.items() if any(map(_is_array, value.values()))}
    # A wrapper may hold a count of steps, an array, beside its state dict: only dicts of nothing but arrays are taken.
    pure = {
        key: value
        for key, value in with_arrays.items()
        if all(isinstance(name, str) and _is_array(array) for name, array in value.items())
    }
    if pure:
        return pure
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
        with np.errstate(over="ignore"):  # float64 may overflow; from_torch refuses infinite weights with a sentence
            return value.astype(np.float32, copy=False)
    if value.dtype.kind not in "iub":
        raise InputError(f"{what} holds {name!r} of dtype {value.dtype}, which is not one of numbers.")
    return value


# Names


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes a prefix of all names, such as `module.`, if timm's or Hugging Face's names follow it."""
    # Wrappers nest (`module._orig_mod.`), so parts are removed one by one until a known name appears.
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
    if poolers := [name for name in arrays if name.startswith("pooler.")]:  # no classifier uses the pooler
        logging.getLogger(__name__).warning("%s holds a pooler, which is left out.", printable(what))
        arrays = {name: value for name, value in arrays.items() if name not in poolers}
    return _with_fused_qkv({_renamed(name, _HUGGING_FACE): value for name, value in arrays.items()})


def _from_big_vision(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Translates names and layouts: Flax has [in, out] and [height, width, in, out], and heads as a separate axis."""
    # Names without the prefix belong to an optimiser.
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
        # A square number of positions leaves none for the class token: big_vision adds positions before it prepends the
        # token. timm adds them after, so the token gets a position of zero.
        renamed["pos_embed"] = np.pad(renamed["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    return _with_fused_qkv(renamed)


def _torch_layout(name: str, value: np.ndarray) -> np.ndarray:
    """An array of big_vision's in PyTorch's layout for its new name; an array of unexpected shape stays as it is."""
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
    """Joins the projections of queries, keys and values into one `qkv`, if all three exist."""
    arrays = dict(arrays)
    for name in [name for name in arrays if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in arrays and arrays[part].shape[1:] == arrays[name].shape[1:] for part in parts):
            arrays[name.replace(".query.", ".qkv.")] = np.concatenate([arrays.pop(part) for part in parts])
    return arrays
