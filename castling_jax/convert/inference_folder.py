"""The inference folder: the switched variables, or a program with them inside, and the model they belong to, on disk.

A folder holds one of PAYLOADS, and `model.json`, which says what model it is, how an image becomes its input, what its
outputs are called, what it was made with, and the SHA-256 of the payload.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save_file as save_safetensors

from castling_jax.convert.files import read_safetensors
from castling_jax.convert.inference import to_inference
from castling_jax.convert.run_folder import CONFIG_FILE, INFERENCE
from castling_jax.convert.shipped import locate
from castling_jax.errors import InputError, about, check_known, reason, refusing, takes
from castling_jax.models.model import Model, image_shape
from castling_jax.models.registry import DTYPES, abstract_model
from castling_jax.models.variables import MODEL, VARIABLES, Variables, apply, flatten, leaves_of, unflatten
from castling_jax.preprocessing import Preprocessing
from castling_jax.storage import (
    as_path,
    copy_folder,
    is_remote,
    local_copy,
    reach_bucket,
    remove,
    sha256_of,
    try_folder,
    write_atomically,
)

VARIABLES_FILE = "variables.safetensors"
PROGRAM_FILE = "program.stablehlo"
MODEL_FILE = "model.json"
PAYLOADS = {"safetensors": VARIABLES_FILE, "orbax": "variables.orbax", "stablehlo": PROGRAM_FILE}
PLATFORMS = ("cpu", "tpu", "cuda")  # what a program is exported for
FORMAT = 2  # format 1 had neither preprocessing nor classes


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model.json says.

    Attributes:
      model: the arguments of `create_model`.
      file: the payload's name, one of PAYLOADS' values.
      sha256: the payload's.
      preprocessing: how an image becomes the model's input; None where it is not stated.
      classes: the names of the model's outputs, in their order; None where they are not stated.
    """

    model: dict[str, Any]
    file: str
    sha256: str
    preprocessing: Preprocessing | None
    classes: list[str] | None


@takes(model=MODEL, variables=VARIABLES)
def save_inference(
    path: str | os.PathLike,
    model: Model,
    variables: Variables,
    *,
    format: str = "safetensors",
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes an inference folder, which `load_inference` reads unless it is a StableHLO program.

    An earlier one there is replaced. What fails or is killed half-way leaves nothing that would be taken for whole.

    Args:
      path: the folder; made if need be.
      model: in training or inference form.
      variables: this model's; switched here if the model is in training form.
      format: one of PAYLOADS: "safetensors", one file; "orbax", a checkpoint; "stablehlo", `export_program`.
      preprocessing: how an image becomes the model's input; None leaves it unsaid.
      classes: the names of the model's outputs, in their order; None leaves them unsaid.

    Raises:
      InputError: the variables are not the model's, the preprocessing or the classes do not fit the model, the format
        is unknown, `path` is a file, or it cannot be written.
    """
    check_known("format", format, PAYLOADS)
    path = as_path(path)
    classes = None if classes is None else list(classes)
    _check_meaning(model.spec.arguments(), preprocessing, classes)
    if is_remote(path):
        reach_bucket(path)
        with tempfile.TemporaryDirectory() as here:
            save_inference(here, model, variables, format=format, preprocessing=preprocessing, classes=classes)
            for name in PAYLOADS.values():  # an earlier one's files would stay among the new ones
                remove(epath.Path(path) / name)
            copy_folder(epath.Path(here), epath.Path(path), last=MODEL_FILE)
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: give a folder, which is made if need be.")
    try_folder(folder)
    if model.spec.form == "train":
        variables = to_inference(variables)
    arguments = model.spec.arguments(form="inference")
    model = abstract_model(**arguments)
    leaves_of(model, variables)
    arrays = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flatten(variables).items()}
    description: dict[str, Any] = {"format": FORMAT, "model": arguments, "file": PAYLOADS[format]}
    description |= {"preprocessing": preprocessing and preprocessing.to_dict(), "classes": classes}
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
            temporary.touch()
            mode = temporary.stat().st_mode
            save_safetensors(arrays, temporary)
            temporary.chmod(mode)  # safetensors' own is 0600, which nobody else may read
        description["sha256"] = sha256_of(temporary)
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


def load_inference(path: str | os.PathLike) -> tuple[Model, Variables]:
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
    description = read_description(folder)
    name = description.file
    payload = folder / name
    if not payload.exists():
        raise InputError(f"'{folder}' is not an inference folder: it has no {name}.")
    if sha256_of(payload) != description.sha256:
        raise InputError(f"'{payload}' is damaged: its SHA-256 is not the one in {MODEL_FILE}.")
    if name == PROGRAM_FILE:
        raise InputError(
            f"'{folder}' holds a program and no variables: jax.export.deserialize of the bytes of {name} gives it, "
            "and its call(images) the logits."
        )
    with refusing((OSError, TypeError, ValueError), f"'{payload}' cannot be read"):
        variables = unflatten(read_safetensors(payload)) if name == VARIABLES_FILE else _load_orbax(payload)
    no_model = (TypeError, ValueError, OverflowError, RecursionError)
    with refusing(no_model, f"'{folder / MODEL_FILE}' describes no model"):
        model = abstract_model(**description.model)
    for path, leaf in leaves_of(model, variables).items():
        check_known(f"dtype of {path!r} in '{payload}'", leaf.dtype.name, DTYPES)
    return model, jax.tree.map(jnp.asarray, variables)


def read_description(path: str | os.PathLike) -> Description:
    """Reads an inference folder's model.json alone, of a StableHLO program too.

    Args:
      path: as `load_inference` takes it.

    Raises:
      InputError: the file is missing, damaged, or of a later format.
    """
    reach_bucket(path)
    folder = locate(path)
    file = folder / MODEL_FILE
    if not file.is_file():
        raise InputError(f"'{folder}' is not an inference folder: it has no {MODEL_FILE}{_where_it_is(folder)}.")
    damage = (OSError, ValueError, KeyError, TypeError, RecursionError)
    with refusing(damage, f"'{file}' is damaged or not an inference folder's"):
        content = json.loads(file.read_text())
        written_as, model, sha256 = content["format"], content["model"], content["sha256"]
        name = content.get("file", VARIABLES_FILE)
        if not isinstance(model, dict) or "name" not in model or name not in PAYLOADS.values():
            raise KeyError("name")
        if (form := model.get("form")) != "inference":
            raise InputError(f"'{file}' describes a model in the form {form!r}, not 'inference'.")
    if written_as not in range(1, FORMAT + 1):
        raise InputError(f"'{file.parent}' is of format {written_as}; this version reads formats up to {FORMAT}.")
    with about(f"'{file}' is damaged"):
        stated, classes = content.get("preprocessing"), content.get("classes")
        preprocessing = None if stated is None else Preprocessing.from_dict(stated)
        _check_meaning(model, preprocessing, classes)
    return Description(model, name, sha256, preprocessing, classes)


def _where_it_is(folder: epath.Path) -> str:
    """Where the inference folder of a run is, for the end of a sentence; "" of another folder."""
    if (folder / INFERENCE / MODEL_FILE).is_file():
        return f"; that of this run is '{folder / INFERENCE}'"
    if (folder / CONFIG_FILE).is_file():
        return "; a run that is not finished has none yet, and python -m castling_jax convert makes one"
    return ""


def _check_meaning(arguments: dict[str, Any], preprocessing: Preprocessing | None, classes: Any) -> None:
    """Raises an InputError unless preprocessing and classes, where stated, fit a model of these arguments."""
    size, channels, count = arguments.get("image_size"), arguments.get("in_chans", 3), arguments.get("num_classes")
    if preprocessing is not None and (preprocessing.image_size, len(preprocessing.channels)) != (size, channels):
        raise InputError(
            f"the preprocessing makes images of {preprocessing.image_size} pixels and {len(preprocessing.channels)} "
            f"channels, and the model takes {size} and {channels}."
        )
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError("classes must be a list of texts.")
    if len(classes) != count:
        raise InputError(f"there are {len(classes):,} names of classes, and the model has {count} classes.")


@takes(model=MODEL, variables=VARIABLES)
def export_program(model: Model, variables: Variables) -> bytes:
    """The inference form's forward pass as serialised StableHLO, with the weights inside.

    One program for PLATFORMS and for any number of images. `jax.export.deserialize(data).call(images)`, images
    [batch, size, size, channels] in float32, gives float32 logits; it needs jax and flatbuffers and no more, and a jax
    that is not older than the one it was written with.
    """
    # A program for several platforms cannot hold a kernel of one of them.
    plain = abstract_model(**model.spec.with_backbone(implementation="xla") | {"form": "inference"})
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *_image_shape(model)), jnp.float32)
    # Compiled by itself, with the variables among its arguments, so that they stay in their dtype in the program.
    forward = jax.jit(functools.partial(apply, plain))
    program = jax.export.export(jax.jit(lambda images: forward(variables, images)), platforms=PLATFORMS)
    return bytes(program(images).serialize())


def _image_shape(model: Model) -> tuple[int, int, int]:
    return *image_shape(model.spec.image_size), model.in_chans


def _save_orbax(path: Path, variables: Variables) -> None:
    import orbax.checkpoint as ocp  # takes a while to import, and is needed here alone

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), variables)


def _load_orbax(path: Path) -> Variables:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())
