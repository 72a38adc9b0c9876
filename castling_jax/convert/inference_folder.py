"""The inference folder: the switched variables, or a program with them inside, and the model they belong to, on disk.

A folder holds `model.json`, which says what it was made from, with what, and the SHA-256 of the rest, and one of
PAYLOADS.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.flax import load_file as load_safetensors
from safetensors.numpy import save_file as save_safetensors

from castling_jax.convert.inference import to_inference
from castling_jax.convert.shipped import locate
from castling_jax.errors import InputError, check_known, reason, refusing
from castling_jax.models.backbone import Backbone
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, check_variables, flatten, unflatten
from castling_jax.storage import check_bucket, copy_folder, is_remote, local_copy, remove, write_atomically

VARIABLES_FILE = "variables.safetensors"
PROGRAM_FILE = "program.stablehlo"
MODEL_FILE = "model.json"
PAYLOADS = {"safetensors": VARIABLES_FILE, "orbax": "variables.orbax", "stablehlo": PROGRAM_FILE}
PLATFORMS = ("cpu", "tpu", "cuda")  # what a program is exported for
FORMAT = 1


def save_inference(
    path: str | os.PathLike, model: Backbone, variables: Variables, *, format: str = "safetensors"
) -> None:
    """Writes an inference folder, which `load_inference` reads unless it is a StableHLO program.

    An earlier one there is replaced. What fails or is killed half-way leaves nothing that would be taken for whole.

    Args:
      path: the folder; made if need be.
      model: in training or inference form.
      variables: this model's; switched here if the model is in training form.
      format: one of PAYLOADS: "safetensors", one file; "orbax", a checkpoint; "stablehlo", `export_program`.

    Raises:
      InputError: the variables are not the model's, the format is unknown, `path` is a file, or it cannot be written.
    """
    check_known("format", format, PAYLOADS)
    if is_remote(path):
        check_bucket(path)
        with tempfile.TemporaryDirectory() as here:
            save_inference(here, model, variables, format=format)
            for name in PAYLOADS.values():  # an earlier one's files would stay among the new ones
                remove(epath.Path(path) / name)
            copy_folder(epath.Path(here), epath.Path(path), last=MODEL_FILE)
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: give a folder, which is made if need be.")
    if model.spec.form == "train":
        variables = to_inference(variables)
    arguments = model.spec.arguments(form="inference")
    model = abstract_model(**arguments)
    check_variables(model, variables)
    arrays = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flatten(variables).items()}
    description: dict[str, Any] = {"format": FORMAT, "model": arguments, "file": PAYLOADS[format]}
    if format == "stablehlo":
        program = export_program(model, unflatten(arrays))
        description |= {"images": ["batch", *_image_shape(model)], "platforms": PLATFORMS}
    payload = folder / PAYLOADS[format]
    temporary = folder / f".{payload.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if format == "stablehlo":
            temporary.write_bytes(program)
        elif format == "orbax":
            _save_orbax(temporary, unflatten(arrays))
        else:
            save_safetensors(arrays, temporary)
        description["sha256"] = _sha256(temporary)
        description["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        remove(payload)
        temporary.replace(payload)
        # The model's file last: a folder without it, or with another checksum, is refused rather than half read.
        write_atomically(folder / MODEL_FILE, json.dumps(description, indent=2).encode())
        for other in set(PAYLOADS.values()) - {payload.name}:
            remove(folder / other)
    except Exception as error:  # Orbax, TensorStore and safetensors raise many kinds
        raise InputError(
            f"'{folder}' could not be written ({reason(error)}); once it can be, the same command goes on."
        ) from error
    finally:
        for unfinished in folder.glob(f".{payload.name}.*"):
            remove(unfinished)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def load_inference(path: str | os.PathLike) -> tuple[Backbone, Variables]:
    """Reads an inference folder, such as the `inference/` of a run.

    Args:
      path: the folder, gs:// too; or a text without a slash, the name of shipped weights: "digits" ("./digits" is a
        folder).

    Returns:
      (model, variables): the model is in inference form and holds shapes only, so that nothing is drawn or kept twice;
      give both to `apply`.

    Raises:
      InputError: a file is missing, was not written by this package, or is damaged; or it is a StableHLO program.
    """
    path = locate(path)
    if is_remote(path):
        with local_copy(path) as copy:
            return load_inference(copy)
    folder = Path(path)
    if not (folder / MODEL_FILE).is_file():
        raise InputError(f"'{folder}' is not an inference folder: it has no {MODEL_FILE}.")
    damage = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError)
    with refusing(damage, f"'{folder / MODEL_FILE}' is damaged or not an inference folder's"):
        description = json.loads((folder / MODEL_FILE).read_text())
        arguments, checksum = description["model"], description["sha256"]
        written_as, name = description["format"], description.get("file", VARIABLES_FILE)
        if not isinstance(arguments, dict) or "name" not in arguments or name not in PAYLOADS.values():
            raise KeyError("name")
    if written_as != FORMAT:
        raise InputError(f"'{folder}' is of format {written_as}; this version reads format {FORMAT}.")
    payload = folder / name
    if not payload.exists():
        raise InputError(f"'{folder}' is not an inference folder: it has no {name}.")
    if _sha256(payload) != checksum:
        raise InputError(f"'{payload}' is damaged: its SHA-256 is not the one in {MODEL_FILE}.")
    if name == PROGRAM_FILE:
        raise InputError(
            f"'{folder}' holds a program and no variables: jax.export.deserialize of the bytes of {name} gives it, "
            "and its call(images) the logits."
        )
    with refusing(SafetensorError, f"'{payload}' cannot be read"):
        variables = unflatten(load_safetensors(payload)) if name == VARIABLES_FILE else _load_orbax(payload)
    with refusing((TypeError, ValueError), f"'{folder / MODEL_FILE}' describes no model"):
        model = abstract_model(**arguments)
    check_variables(model, variables)
    return model, variables


def export_program(model: Backbone, variables: Variables) -> bytes:
    """The inference form's forward pass as serialised StableHLO, with the weights inside.

    One program for PLATFORMS and for any number of images. `jax.export.deserialize(data).call(images)`, images
    [batch, size, size, channels] in float32, gives float32 logits; it needs jax and flatbuffers and no more, and a jax
    that is not older than the one it was written with.
    """
    # A program for several platforms cannot hold a kernel of one of them.
    plain = abstract_model(**model.spec.arguments(form="inference", implementation="xla"))
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *_image_shape(model)), jnp.float32)
    # Compiled by itself, with the variables among its arguments, so that they stay in their dtype in the program.
    forward = jax.jit(functools.partial(apply, plain))
    program = jax.export.export(jax.jit(lambda images: forward(variables, images)), platforms=PLATFORMS)
    return bytes(program(images).serialize())


def _image_shape(model: Backbone) -> tuple[int, int, int]:
    size = model.spec.image_size
    return size, size, model.spec.arguments().get("in_chans", 3)


def _save_orbax(path: Path, variables: Variables) -> None:
    import orbax.checkpoint as ocp  # takes a while to import, and is needed here alone

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), variables)


def _load_orbax(path: Path) -> Variables:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(jnp.asarray, checkpointer.restore(path.absolute()))


def _sha256(path: Path) -> str:
    """Of a file's bytes; of a folder's names and files, in their order."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {_sha256(file_path)}\n".encode())
    return digest.hexdigest()
