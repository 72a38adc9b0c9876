"""The inference folder: the switched variables and the model they belong to, on disk."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file as load_safetensors
from safetensors.numpy import save as save_safetensors

from castling_jax.convert.inference import to_inference
from castling_jax.models.backbone import Backbone
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, check_variables, flatten, unflatten
from castling_jax.ops.errors import InputError

VARIABLES_FILE = "variables.safetensors"
MODEL_FILE = "model.json"
FORMAT = 1


def save_inference(path: str | os.PathLike, model: Backbone, variables: Variables) -> None:
    """Writes the inference folder that `load_inference` reads; an earlier one there is replaced file by file.

    Args:
      path: the folder; made if need be.
      model: in training or inference form.
      variables: this model's; switched here if the model is in training form.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    spec = model.spec
    if spec.form == "train":
        variables = to_inference(variables)
    check_variables(abstract_model(**spec.arguments(form="inference")), variables)
    arrays = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flatten(variables).items()}
    data = save_safetensors(arrays)
    description = {
        "format": FORMAT,
        "model": spec.arguments(form="inference"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }
    # The model's file last: a folder without it, or with another checksum, is refused rather than half read.
    write_atomically(folder / VARIABLES_FILE, data)
    write_atomically(folder / MODEL_FILE, json.dumps(description, indent=2).encode())


def load_inference(path: str | os.PathLike) -> tuple[Backbone, Variables]:
    """Reads an inference folder, such as the `inference/` of a run.

    Returns:
      (model, variables): the model is in inference form and holds shapes only, so that nothing is drawn or kept twice;
      give both to `apply`.

    Raises:
      InputError: a file is missing, was not written by this package, or is damaged.
    """
    folder = Path(path)
    for name in (MODEL_FILE, VARIABLES_FILE):
        if not (folder / name).is_file():
            raise InputError(f"'{folder}' is not an inference folder: it has no {name}.")
    try:
        description = json.loads((folder / MODEL_FILE).read_text())
        arguments, checksum = description["model"], description["sha256"]
        written_as = description["format"]
        if not isinstance(arguments, dict) or "name" not in arguments:
            raise KeyError("name")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"'{folder / MODEL_FILE}' is damaged or not an inference folder's: {error!r}.") from error
    if written_as != FORMAT:
        raise InputError(f"'{folder}' is of format {written_as}; this version reads format {FORMAT}.")
    data = (folder / VARIABLES_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != checksum:
        raise InputError(f"'{folder / VARIABLES_FILE}' is damaged: its SHA-256 is not the one in {MODEL_FILE}.")
    try:
        variables = unflatten(load_safetensors(folder / VARIABLES_FILE))
    except SafetensorError as error:
        raise InputError(f"'{folder / VARIABLES_FILE}' cannot be read: {error}.") from error
    try:
        model = abstract_model(**arguments)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"'{folder / MODEL_FILE}' describes no model: {str(error).splitlines()[0]}.") from error
    check_variables(model, variables)
    return model, variables


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a run killed meanwhile, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
