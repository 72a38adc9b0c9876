"""The inference folder: a model's inference form on disk, as variables or as a program with the variables inside.

A folder holds one of PAYLOADS, and `model.json`: the model's arguments, how an image becomes its input, the names of
its outputs, the versions of the packages that wrote it, and the SHA-256 of the payload.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
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
from castling_jax.errors import InputError, about, check, check_known, reason, refusing, takes
from castling_jax.models.model import Model
from castling_jax.models.registry import DTYPES, abstract_model
from castling_jax.models.variables import MODEL, VARIABLES, Variables, apply, flatten, leaves_of, unflatten
from castling_jax.normalization import model_input
from castling_jax.ops.suppression import non_maximum_suppression
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import image_shape, size_text
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
PLATFORMS = ("cpu", "tpu", "cuda")  # an exported program runs on all of them
IMAGE_DTYPES = ("float32", "uint8")  # what a program takes: normalised pixels, or pixels that it normalises
FORMAT = 2  # format 1 had neither preprocessing nor classes


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of a model.json.

    Attributes:
      model: the arguments of `create_model`.
      file: the payload's name, one of PAYLOADS' values.
      sha256: the payload's SHA-256.
      preprocessing: how an image becomes the model's input; None if the file does not state it.
      classes: the names of the model's outputs, in their order; None if the file does not state them.
      suppression: how a detector's outputs become detections; None if the file does not state it.
      category_ids: the number of each class in the annotations that a detector learnt from; None if the file does not
        state them.
      image_dtype: one of IMAGE_DTYPES: "uint8" if the payload is a program that normalises pixels itself.
    """

    model: dict[str, Any]
    file: str
    sha256: str
    preprocessing: Preprocessing | None
    classes: list[str] | None
    suppression: Suppression | None
    category_ids: list[int] | None
    image_dtype: str = "float32"


@takes(model=MODEL, variables=VARIABLES)
def save_inference(
    path: str | os.PathLike,
    model: Model,
    variables: Variables,
    *,
    format: str = "safetensors",
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    suppression: Suppression | None = None,
    category_ids: Sequence[int] | None = None,
    uint8: bool = False,
) -> None:
    """Writes an inference folder, which `load_inference` reads unless it holds a StableHLO program.

    An earlier inference folder is replaced. If writing fails or is killed, nothing remains that looks complete.

    Args:
      path: the folder, created if need be.
      model: the model, in training or inference form.
      variables: the model's variables. If the model is in training form, they are switched to inference form here.
      format: one of PAYLOADS: "safetensors", one file; "orbax", a checkpoint; "stablehlo", the program from
        `export_program`.
      preprocessing: how an image becomes the model's input; with None, model.json does not state it.
      classes: the names of the model's outputs, in their order; with None, model.json does not state them.
      suppression: how a detector's outputs become detections. A StableHLO program then suppresses by itself; with None
        it returns the scores and boxes of all points.
      category_ids: the number of each class in the annotations that a detector learnt from; with None, model.json does
        not state them.
      uint8: whether a StableHLO program takes uint8 pixels and normalises them itself, as `preprocessing` says.

    Raises:
      InputError: the variables are not the model's, or neither float32 nor bfloat16; the preprocessing or the classes
        do not fit the model; the format is unknown or has no program for `uint8`; `path` is a file; or it cannot be
        written.
    """
    check_known("format", format, PAYLOADS)
    if uint8:
        check_uint8(format)
        check(preprocessing is not None, "a program for uint8 images needs the preprocessing that it normalises by.")
    path = as_path(path)
    classes = None if classes is None else list(classes)
    category_ids = None if category_ids is None else list(category_ids)
    _check_meaning(model.spec.arguments(), preprocessing, classes, category_ids)
    if is_remote(path):
        reach_bucket(path)
        with tempfile.TemporaryDirectory() as here:
            stated: dict[str, Any] = {"preprocessing": preprocessing, "classes": classes, "suppression": suppression}
            stated |= {"category_ids": category_ids, "uint8": uint8}
            save_inference(here, model, variables, format=format, **stated)
            # Copying onto an earlier payload would leave old files among the new ones.
            for name in PAYLOADS.values():
                remove(epath.Path(path) / name)
            copy_folder(epath.Path(here), epath.Path(path), last=MODEL_FILE)
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: give a folder, which is created if need be.")
    try_folder(folder)
    if model.spec.form == "train":
        variables = to_inference(variables)
    arguments = model.spec.arguments(form="inference")
    model = abstract_model(**arguments)
    leaves_of(model, variables)
    arrays = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flatten(variables).items()}
    _require_dtypes(arrays)
    description: dict[str, Any] = {"format": FORMAT, "model": arguments, "file": PAYLOADS[format]}
    description |= {"preprocessing": preprocessing and preprocessing.to_dict(), "classes": classes}
    if model.task == "detection":
        description |= {"suppression": suppression and suppression.to_dict(), "category_ids": category_ids}
    if format == "stablehlo":
        program = export_program(model, unflatten(arrays), suppression, pixels=preprocessing if uint8 else None)
        description |= {"images": ["batch", *_image_shape(model)], "platforms": PLATFORMS}
        description |= {"image_dtype": IMAGE_DTYPES[uint8]}
    # The payload has a temporary name until it is complete, and an earlier payload stays in place until then.
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
            temporary.chmod(mode)  # safetensors sets 0600, so nobody else could read the file
        description["sha256"] = sha256_of(temporary)
        description["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        remove(payload)
        temporary.replace(payload)
        # model.json comes last: a folder without it, or with another checksum in it, is refused instead of half read.
        write_atomically(folder / MODEL_FILE, json.dumps(description, indent=2).encode())
        for other in set(PAYLOADS.values()) - {payload.name}:
            remove(folder / other)
    except Exception as error:  # Orbax, TensorStore and safetensors raise many kinds
        raise InputError(
            f"'{folder}' could not be written ({reason(error)}); run the same command again once it can be written."
        ) from error
    finally:
        for unfinished in folder.glob(f".{payload.name}.*"):
            remove(unfinished)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def load_inference(path: str | os.PathLike) -> tuple[Model, Variables]:
    """Reads an inference folder, such as the `inference/` of a run.

    Args:
      path: the folder, gs:// too; or a string without a slash, the name of shipped weights: "digits" ("./digits" is a
        folder).

    Returns:
      (model, variables), for `apply`: the model is in inference form and holds shapes only, so no parameters are drawn
      or kept twice.

    Raises:
      InputError: a file is missing, was not written by this package, or is damaged; or the folder holds a StableHLO
        program.
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
            f"'{folder}' holds a program and no variables: jax.export.deserialize(bytes of {name}) loads it, and its "
            "call(images) computes the outputs."
        )
    with refusing((OSError, TypeError, ValueError), f"'{payload}' cannot be read"):
        variables = unflatten(read_safetensors(payload)) if name == VARIABLES_FILE else _load_orbax(payload)
    no_model = (TypeError, ValueError, OverflowError, RecursionError)
    with refusing(no_model, f"'{folder / MODEL_FILE}' describes no model"):
        model = abstract_model(**description.model)
    _require_dtypes(leaves_of(model, variables), f" in '{payload}'")
    return model, jax.tree.map(jnp.asarray, variables)


def read_description(path: str | os.PathLike) -> Description:
    """Reads the model.json of an inference folder, but not the payload, which may be a StableHLO program.

    Args:
      path: the folder, as `load_inference` takes it.

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
            raise KeyError("name")  # reported as damage
        if (form := model.get("form")) != "inference":
            raise InputError(f"'{file}' describes a model in the form {form!r}, not 'inference'.")
    if written_as not in range(1, FORMAT + 1):
        raise InputError(f"'{file.parent}' has format {written_as}; this version reads formats up to {FORMAT}.")
    with about(f"'{file}' is damaged"):
        stated, classes, category_ids = map(content.get, ("preprocessing", "classes", "category_ids"))
        preprocessing = None if stated is None else Preprocessing.from_dict(stated)
        _check_meaning(model, preprocessing, classes, category_ids)
        with refusing(TypeError, "suppression"):
            suppression = Suppression(**content["suppression"]) if content.get("suppression") else None
        image_dtype = content.get("image_dtype", "float32")  # programs without this key take float32
        check(image_dtype in IMAGE_DTYPES, f"image_dtype must be float32 or uint8, not {str(image_dtype)[:100]!r}.")
    return Description(model, name, sha256, preprocessing, classes, suppression, category_ids, image_dtype)


def check_uint8(format: str) -> None:
    """Refuses `uint8` for a format that holds no program."""
    check(format == "stablehlo", f"only a program takes uint8 images: the format must be stablehlo, not {format}.")


def _require_dtypes(leaves: Mapping[str, Any], place: str = "") -> None:
    """Raises an InputError unless all arrays, by path, have a dtype that a model's parameters may have."""
    for path, leaf in leaves.items():
        check_known(f"dtype of {path!r}{place}", leaf.dtype.name, DTYPES)


def _where_it_is(folder: epath.Path) -> str:
    """The end of a sentence, which says where a run's inference folder is; "" if `folder` is not a run's."""
    if (folder / INFERENCE / MODEL_FILE).is_file():
        return f"; this run's inference folder is '{folder / INFERENCE}'"
    if (folder / CONFIG_FILE).is_file():
        return "; a run that is not finished has none yet, and python -m castling_jax convert makes one"
    return ""


def _check_meaning(
    arguments: dict[str, Any], preprocessing: Preprocessing | None, classes: Any, category_ids: Any
) -> None:
    """Raises an InputError unless preprocessing, classes and their ids, if stated, fit a model with these arguments."""
    size, channels, count = arguments.get("image_size"), arguments.get("in_chans", 3), arguments.get("num_classes")
    size = tuple(size) if isinstance(size, list) else size
    if preprocessing is not None and (preprocessing.image_size, len(preprocessing.channels)) != (size, channels):
        raise InputError(
            f"the preprocessing makes images of {size_text(preprocessing.image_size)} and "
            f"{len(preprocessing.channels)} channels, but the model takes the size {size} and {channels} channels."
        )
    stated = (("classes", classes, str, "texts", "names"), ("category_ids", category_ids, int, "integers", "ids"))
    for argument, listed, kind, words, what in stated:
        if listed is None:
            continue
        if not isinstance(listed, list) or not all(isinstance(value, kind) for value in listed):
            raise InputError(f"{argument} must be a list of {words}.")
        if len(listed) != count:
            raise InputError(f"there are {len(listed):,} {what} of classes, but the model has {count} classes.")


@takes(model=MODEL, variables=VARIABLES)
def export_program(
    model: Model,
    variables: Variables,
    suppression: Suppression | None = None,
    *,
    pixels: Preprocessing | None = None,
) -> bytes:
    """The inference form's forward pass as serialised StableHLO, with the weights inside.

    One program serves all PLATFORMS and any number of images. `jax.export.deserialize(data).call(images)` turns images
    [batch, height, width, channels] in float32 into what `apply` returns: float32 logits, or a dict of a detector's
    scores and boxes. With `pixels`, the images are uint8, and the program normalises them as this preprocessing says.
    With `suppression`, a detector's program returns `ops.non_maximum_suppression`'s dict of
    detections instead. A segmenter's program returns the class of each pixel, int32 [batch, height, width]. The program
    needs only jax and flatbuffers, and a jax not older than the one that exported it.
    """
    # A program for several platforms cannot contain a kernel for one of them.
    plain = abstract_model(**model.spec.with_backbone(implementation="xla") | {"form": "inference"})
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *_image_shape(model)), jnp.float32 if pixels is None else jnp.uint8)

    # An inner jit takes the variables as arguments. If they were constants, tracing would cast them to wider types, and
    # the program would store those.
    forward = jax.jit(functools.partial(program_outputs, plain, suppression=suppression))

    def run(images: jax.Array) -> Any:
        return forward(variables, images if pixels is None else model_input(images, pixels))

    program = jax.export.export(jax.jit(run), platforms=PLATFORMS)
    return bytes(program(images).serialize())


def compute_outputs(
    model: Model, variables: Variables, images: jax.Array, *, suppression: Suppression | None = None
) -> Any:
    """The model's outputs or, with a suppression, a detector's detections."""
    outputs = apply(model, variables, images)
    return outputs if suppression is None else non_maximum_suppression(**outputs, **suppression.to_dict())


def program_outputs(
    model: Model, variables: Variables, images: jax.Array, *, suppression: Suppression | None = None
) -> Any:
    """What an exported program computes: `compute_outputs`; for a segmenter, each pixel's class."""
    outputs = compute_outputs(model, variables, images, suppression=suppression)
    return outputs["logits"].argmax(-1).astype(jnp.int32) if model.task == "segmentation" else outputs


def _image_shape(model: Model) -> tuple[int, int, int]:
    return *image_shape(model.spec.image_size), model.in_chans


def _save_orbax(path: Path, variables: Variables) -> None:
    import orbax.checkpoint as ocp  # here, because importing Orbax takes a while

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), variables)


def _load_orbax(path: Path) -> Variables:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())
