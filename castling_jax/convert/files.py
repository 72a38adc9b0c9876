"""Reads files of weights from other projects: a file in, names and arrays out. names.py interprets the names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from castling_jax.convert.names import timm_state_dict
from castling_jax.errors import InputError, check, refusing
from castling_jax.storage import as_path, is_remote, local_copy

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".th", ".ckpt", ".tar")  # the last six are PyTorch's

_DTYPES = {  # safetensors' names of dtypes -> dtypes; its own readers do not support float8
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{
        f"{kind}{bits}": np.dtype(f"{name}{bits}")
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_state_dict(path: str | os.PathLike, *, ema: bool | None = None) -> dict[str, np.ndarray]:
    """The weights in a safetensors file, NumPy's .npz or a PyTorch file (.pth, .pt, .bin, ...), for `from_torch`.

    A PyTorch file needs torch. No code in it is run: it is read with weights_only=True, and blanks replace objects that
    are no tensors, such as a script's options.

    Args:
      path: a file on this machine or in a bucket (gs://).
      ema: for a checkpoint with both, whether to read the moving average instead of the raw weights. None reads the raw
        weights, and a warning of this package's logger says so.

    Returns:
      timm 1.0's names -> arrays; floating-point arrays are float32 whatever the file has. Wrappers such as "model" and
      "state_dict" and a prefix before all names are removed, and Hugging Face's names for ViT and DeiT and big_vision's
      for ViT are translated.

    Raises:
      InputError: there is no such file; it is of another kind or damaged; it holds no weights, or several sets of
        weights; or torch is needed but not installed.
    """
    where = as_path(path)
    if is_remote(where):
        with local_copy(where) as copy:
            return read_state_dict(copy, ema=ema)
    file = Path(where)
    check(file.is_file(), f"there is no file '{file}' to read weights from.")
    suffix = file.suffix.lower()
    check(suffix in SUFFIXES, f"'{file}' is no file of weights, whose names end in {', '.join(SUFFIXES)}.")
    with refusing(OSError, f"'{file}' cannot be read"):
        content = {".safetensors": read_safetensors, ".npz": _read_npz}.get(suffix, _read_torch)(file)
    if not isinstance(content, Mapping):
        raise InputError(f"'{file}' holds a {type(content).__qualname__}, not a dict of names to arrays.")
    arrays = timm_state_dict(content, f"'{file}'", ema=ema)
    check(arrays, f"'{file}' holds no weights: it is empty.")
    return arrays


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's arrays, each in the dtype that it is stored in.

    Raises:
      InputError: the file is damaged, of another kind, or has an array of an unsupported dtype.
    """
    with refusing(SafetensorError, f"'{path}' cannot be read: it is damaged or no safetensors file"):
        entries = deserialize(path.read_bytes())
    arrays = {}
    for name, entry in entries:
        dtype = entry["dtype"]
        check(dtype in _DTYPES, f"'{path}' holds {name!r} of dtype {dtype}, not one of {', '.join(_DTYPES)}.")
        # A copy, because an array over bytes is read-only.
        arrays[name] = np.frombuffer(entry["data"], _DTYPES[dtype]).reshape(entry["shape"]).copy()
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    no_npz = refusing(Exception, f"'{path}' is damaged or no .npz file")  # zipfile, zlib and numpy raise many kinds
    with no_npz, np.load(path, allow_pickle=False) as file:
        return dict(file)


class _Blank:
    """Stands in for an object whose class is not PyTorch's: accepts any arguments and state, and ignores them."""

    def __new__(cls, *_: Any, **__: Any) -> "_Blank":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        way_out = "pip install torch, or store the weights as .safetensors"
        raise InputError(f"'{path}' is read with torch, which is not installed: {way_out}.") from None
    blanks: dict[str, type] = {}
    # torch names one forbidden class at a time. Allow a blank in its place and load again, until none is left.
    while True:
        try:
            with torch.serialization.safe_globals(list(blanks.values())):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zipfile and torch raise many kinds
            forbidden = re.search(r"GLOBAL `?([\w.]+)", str(error))
            if forbidden and forbidden[1] not in blanks:
                module, _, name = forbidden[1].rpartition(".")
                blanks[forbidden[1]] = type(name, (_Blank,), {"__module__": module, "__qualname__": name})
                continue
            # The same name again, or none: a blank cannot help.
            blocking = forbidden[1] if forbidden else ", ".join(blanks)
            problem = f"holds {blocking}" if blocking else "is damaged, or holds other things than weights"
            raise InputError(f"'{path}' {problem}: store its state dict alone.") from error
