"""The cases of the compile report: a user's function, an attention layer of DeiT-B, a model, a configuration's step."""

import dataclasses
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from castling_jax.bench.rivals import make_module, run_module
from castling_jax.convert.run_folder import model_arguments, preprocessing_of
from castling_jax.data.sources import Dataset, Unread
from castling_jax.errors import InputError, check_at_least, check_known
from castling_jax.models.attention.core import Kind
from castling_jax.models.attention.kinds import FORMS, KINDS, make_core
from castling_jax.models.layers import add_bias
from castling_jax.models.macs import count_macs
from castling_jax.models.registry import abstract_model, with_backbone_arguments
from castling_jax.models.variables import Variables, apply, get_variables
from castling_jax.sizes import ImageSize, image_shape
from castling_jax.storage import as_path
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.task import Teacher
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.overrides import load_overridden
from castling_jax.training.schedules import learning_rate_schedule
from castling_jax.training.setup import load_split, named_splits, set_up
from castling_jax.training.sharding import (
    AXES,
    batch_shapes,
    check_batch,
    check_heads,
    make_mesh,
    replicated,
    state_shardings,
    whole_over_fsdp,
    with_shardings,
)
from castling_jax.training.state import create_state
from castling_jax.training.step import make_train_step
from castling_jax.training.weights import teacher_model

CHANNELS, HEADS, TAPS = 768, 12, 9  # DeiT-B's
# Data set -> (classes, images to learn from, held-out images, annotation of an image). A step is compiled from these
# alone: its last layer depends on the classes, and its schedule on the numbers of images.
PUBLISHED_SIZES = {
    "imagenet2012": (1000, 1_281_167, 50_000, "label"),
    "fashion_mnist": (10, 60_000, 10_000, "label"),
    "coco/2017": (80, 118_287, 5_000, "boxes"),
    "masks:PATH/ADE20K": (150, 20_210, 2_000, "mask"),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts that a report states about the program of a configuration.

    Attributes:
      model: the model's name.
      attention: its attention.
      image_size: pixels a side, or (height, width).
      form: "train" for the training step, "inference" for the forward pass of the inference form.
      mesh: axis -> devices along it.
      images: images in one call, on all devices together.
      images_per_device: the same on each device.
      assumed: a sentence for each assumption, such as the size of a data set that is not here.
      macs: multiply-accumulates of one image's forward pass.
    """

    model: str
    attention: str
    image_size: ImageSize
    form: str
    mesh: dict[str, int]
    images: int
    images_per_device: float
    assumed: list[str]
    macs: int


class Case(NamedTuple):
    """A function to compile, and the shapes to compile it for.

    Whatever varies from call to call is an argument, the cotangent and the threshold too. The compiler would fold
    constants, and drop the work that they make needless.

    Attributes:
      function: the function, which takes `arguments`.
      arguments: trees of shapes.
      jit_options: keyword arguments of jax.jit.
      mesh: the mesh that the function is traced on.
      held: kind -> the part of the arguments that is of this kind, such as "parameters".
      facts: what a report says about a configuration's program; None for other cases.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    jit_options: Mapping[str, Any] = MappingProxyType({})
    mesh: Mesh | None = None
    held: Mapping[str, Any] = MappingProxyType({})
    facts: Facts | None = None


def load_case(what: str, options: dict[str, Any], devices: list[Any]) -> Case:
    """A case by its name or from a file.

    Args:
      what: "layer", "model", "recipe" or "FILE.py:NAME".
      options: keyword arguments of the case's function in this module.
      devices: the devices to compile for. NAME in FILE.py gets them if it has an argument `devices`.

    Raises:
      InputError: an option, the file or NAME does not exist, or NAME does not return (function, arguments).
    """
    if what in CASES:
        words = list(inspect.signature(CASES[what]).parameters)
        placed = {"devices": devices} if "devices" in words else {}
        for word in options:
            check_known(f"option of {what}", word, [known for known in words if known not in placed])
        return CASES[what](**options, **placed)
    if options:
        cases = " and ".join(OF_THE_COMMAND)
        raise InputError(f"--{next(iter(options))} is an option of {cases}, not of a function in a file.")
    return _from_file(what, devices)


def _from_file(what: str, devices: list[Any]) -> Case:
    path, name = what.rsplit(":", 1)
    path = str(as_path(path))
    if not Path(path).is_file():
        raise InputError(f"there is no file '{path}'.")
    # The file may import modules beside it, and modules in the folder that the command was started in.
    sys.path[:0] = [str(Path.cwd()), str(Path(path).resolve().parent)]
    spec = importlib.util.spec_from_file_location("case", path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_known(f"function of '{path}'", name, [word for word, value in vars(module).items() if callable(value)])
    make = getattr(module, name)
    parts = make(devices=devices) if "devices" in inspect.signature(make).parameters else make()
    if not isinstance(parts, tuple) or len(parts) not in (2, 3) or not callable(parts[0]):
        raise InputError(f"{what} must return (function, arguments) or (function, arguments, jit options).")
    return Case(*parts)


def _bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _check_positive(**sizes: int | None) -> None:
    for word, size in sizes.items():
        if size is not None:
            check_at_least(f"--{word}", size, 1)


def layer(
    *,
    form: str = "inference",
    tokens: int = 197,
    batch: int = 128,
    attention: str = "castling",
    implementation: str = "auto",
) -> Case:
    """The attention layer of DeiT-B in bfloat16: its three input projections, the attention, the output projection.

    form="train" adds the backward pass, to all weights and to the layer's input. An attention that brings a module or
    parameters of its own is compiled as that module, with its tokens on the largest square grid and the rest before it.
    """
    core = make_core(attention, form, token_conv="1d", implementation=implementation)
    _check_positive(tokens=tokens, batch=batch)
    if implementation == "pallas" and not core.kind.takes("implementation"):
        raise InputError(f'there are no Pallas kernels of {attention} attention: leave --implementation at "auto".')
    x = _bfloat16(batch, tokens, CHANNELS)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    linear = {"kernel": _bfloat16(CHANNELS, CHANNELS), "bias": _bfloat16(CHANNELS)}
    weights: Any = {"q": linear, "k": linear, "v": linear, "proj": linear, "token_kernel": _bfloat16(TAPS, HEADS)}
    run: Callable[..., jax.Array] = functools.partial(_run_layer, kind=core.kind, implementation=implementation)
    if core.kind.module or core.kind.parameters:
        graphdef, weights = nnx.split(nnx.eval_shape(lambda: make_module(core, CHANNELS, HEADS, "bfloat16")), nnx.Param)
        run = functools.partial(run_module, graphdef)
    if form == "inference":
        return Case(run, (weights, x, threshold))

    def run_and_differentiate(weights, x, cotangent, threshold):
        out, backward = jax.vjp(lambda weights, x: run(weights, x, threshold), weights, x)
        return out, backward(cotangent)

    return Case(run_and_differentiate, (weights, x, x, threshold))


def _run_layer(weights, x, threshold, *, kind: Kind, implementation: str) -> jax.Array:
    def project(x, name):
        return x @ weights[name]["kernel"]

    q, k, v = (
        add_bias(project(x, name), weights[name]["bias"]).reshape(*x.shape[:2], HEADS, CHANNELS // HEADS)
        for name in "qkv"
    )
    taps = weights["token_kernel"] if kind.taps else None
    out, _ = kind(q, k, v, token_kernel=taps, mask_threshold=threshold, implementation=implementation)
    return project(out.reshape(x.shape), "proj") + weights["proj"]["bias"]


def model(
    *,
    name: str = "deit_base",
    image_size: int | None = None,
    batch: int = 128,
    form: str = "inference",
    attention: str = "castling",
    depth: int | None = None,
    remat: bool = False,
    mesh: str | None = None,
    devices: Sequence[Any] = (),
) -> Case:
    """A whole model that computes in bfloat16 and holds its parameters in float32.

    form="inference" compiles the forward pass. form="train" compiles the training step of the training form at a
    threshold below 1: forward, backward and AdamW's update, with the state donated. `remat` has the backward pass
    compute each block again. A `mesh` such as "data:64,fsdp:4" makes the step the one that pods run: `devices` stand
    along the mesh's axes, `state_shardings` places the state, and `batch` counts the images of all devices together.
    """
    _check_positive(image_size=image_size, batch=batch)
    if mesh is not None and form != "train":
        raise InputError("--mesh splits the training step: it needs --form=train.")
    arguments = {"name": name, "attention": attention, "form": form, "image_size": image_size, "dtype": jnp.bfloat16}
    of_the_backbone = ({"remat": True} if remat else {}) | ({} if depth is None else {"depth": depth})
    built = abstract_model(**with_backbone_arguments(arguments | of_the_backbone))
    size = built.spec.image_size
    images = jax.ShapeDtypeStruct((batch, *image_shape(size), 3), jnp.float32)
    variables = get_variables(built)
    if form == "inference":
        return Case(functools.partial(apply, built), (variables, images))

    config = default_config()
    config.dataset.update(crop_mode="squash", crop_ratio=1.0)  # all tasks take it, and the step does not depend on it
    rate = learning_rate_schedule(config.optimizer, batch_size=batch, total_steps=100_000, steps_per_epoch=1_000)
    optimizer = make_optimizer(config.optimizer, rate)
    state = jax.eval_shape(lambda variables: create_state(variables, optimizer, config.seed), variables)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    placed = shardings = None
    if mesh is not None:
        placed = make_mesh(read_mesh(mesh), devices)
        check_heads(built, placed)
        check_batch("--batch", batch, placed)
        shardings = state_shardings(state, placed)
        state, threshold = with_shardings((state, threshold), (shardings, replicated(placed)))
    task = task_of(built).from_config(config, built)
    step = make_train_step(built, optimizer, task, preprocessing=preprocessing_of(config, size), shardings=shardings)
    shapes = batch_shapes(task.example_shapes(size), batch, placed)
    return Case(step, (state, shapes, threshold), {"donate_argnums": 0}, placed)


def recipe(
    *,
    config: str,
    fields: Sequence[str] = (),
    form: str = "train",
    attention: str | None = None,
    image_size: int | None = None,
    batch: int | None = None,
    remat: bool | None = None,
    mesh: str | None = None,
    devices: Sequence[Any] = (),
) -> Case:
    """What a run of a configuration compiles: its training step, or the forward pass of its inference form.

    Args:
      config: the configuration, as `load_config` takes it.
      fields: words --config.GROUP.FIELD=VALUE that override its fields.
      form: "train" or "inference".
      attention: replaces the configuration's attention.
      image_size: pixels a side; replaces the configuration's.
      batch: images on each device; replaces the configuration's batch, which counts the images of all devices.
      remat: whether the backward pass computes blocks again; replaces the configuration's choice.
      mesh: replaces the configuration's mesh; written as `read_mesh` takes it.
      devices: the devices along the mesh's axes.
    """
    check_known("form", form, FORMS)
    if attention is not None:
        check_known("attention", attention, KINDS)
    _check_positive(image_size=image_size, batch=batch)
    settings = load_overridden(config, fields)
    replaced = {"attention": attention, "image_size": image_size, "remat": remat}
    settings.model.update({word: value for word, value in replaced.items() if value is not None})
    if attention is not None and not KINDS[attention].takes("mask_kind"):
        settings.mask.kind = "threshold"  # only castling fades its mask
    if mesh is not None:
        settings.mesh.update(read_mesh(mesh))
    if batch is not None:
        settings.train.batch_size = batch * len(devices)
    # The evaluation is not compiled. If its batch does not fit the mesh, `assumed` says so below; nothing is refused.
    evaluated = settings.evaluation.batch_size
    settings.evaluation.batch_size = settings.train.batch_size or evaluated
    datasets, assumed = _datasets(settings)
    teacher, taught_by = _teacher(settings, datasets[0].num_classes)
    setup = set_up(settings, devices, datasets, teacher)
    spec, images, placed = setup.model.spec, setup.config.train.batch_size, setup.mesh
    try:
        check_batch("config.evaluation.batch_size", evaluated, placed)
    except InputError as error:
        assumed = [*assumed, f"main.py would refuse to evaluate: {error}"]
    shapes = batch_shapes(setup.task.example_shapes(spec.image_size), images, placed)
    model = setup.model if form == "train" else abstract_model(**spec.arguments(form="inference"))
    facts = Facts(
        model=spec.name,
        attention=spec.attention,
        image_size=spec.image_size,
        form=form,
        mesh=dict(placed.shape),
        images=images,
        images_per_device=images / len(devices),
        assumed=assumed + taught_by * (form == "train"),
        macs=count_macs(model),
    )

    def whole(variables: Variables) -> Variables:
        # Weights that no step changes are gathered over fsdp once, when a run starts.
        return with_shardings(variables, whole_over_fsdp(state_shardings(variables, placed)))

    if form == "train":
        state = with_shardings(setup.state, setup.shardings)
        threshold = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(placed))
        taught = {} if teacher is None else whole(teacher.variables)
        held = {
            "parameters": state.params,
            "optimiser": state.opt_state,
            "moving averages": state.ema,
            "batch statistics": state.batch_stats,
            "teacher": taught,
            "images and labels": shapes,
        }
        arguments = state, shapes, threshold, taught
        return Case(setup.train_step, arguments, {"donate_argnums": 0}, placed, held, facts)
    variables, seen = whole(get_variables(model)), shapes["image"]
    seen = jax.ShapeDtypeStruct(seen.shape, jnp.float32, sharding=seen.sharding)  # what `apply` takes
    held = {"parameters": variables, "images": seen}
    return Case(functools.partial(apply, model), (variables, seen), {}, placed, held, facts)


def _teacher(config: ConfigDict, classes: int) -> tuple[Teacher | None, list[str]]:
    """A configuration's teacher as shapes, and a sentence on what was assumed about it."""
    options = config.distillation
    if options.kind is None:
        return None, []
    student = abstract_model(num_classes=classes, **model_arguments(config))
    source = teacher_model(options.name or student.spec.name, student)
    model = abstract_model(**source.spec.arguments(form="inference"))
    assumed = (
        f"the teacher is {model.spec.name} with softmax attention; its weights are not read; MFU leaves out its work"
    )
    return Teacher(model, get_variables(model), options.kind, options.alpha, options.temperature), [assumed]


def _datasets(config: ConfigDict) -> tuple[tuple[Dataset, Dataset], list[str]]:
    """A configuration's data sets; or stand-ins of the published sizes, with a sentence that says so."""
    data = config.dataset
    try:
        train_set, eval_set = (load_split(config, split) for split in named_splits(data))
        return (train_set, eval_set), []
    except InputError:
        if data.name not in PUBLISHED_SIZES:
            raise
    classes, train, held_out, annotation = PUBLISHED_SIZES[data.name]
    assumed = f"{data.name} is not on this machine; {train:,} images and {classes:,} classes are assumed, as published"
    return (Unread(train, classes, annotation), Unread(held_out, classes, annotation)), [assumed]


def read_mesh(text: str) -> dict[str, int]:
    """The size of each axis of a mesh, from a string such as "data:64,fsdp:-1"; axes that it leaves out have size 1.

    Raises:
      InputError: an axis is unknown or named twice, or its size is not an integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        check_known("axis of --mesh", axis, AXES)
        if axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise InputError(f"--mesh names each axis once, with its size, as in data:64,fsdp:4, not {text!r}.")
        sizes[axis] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


CASES: dict[str, Callable[..., Case]] = {"layer": layer, "model": model, "recipe": recipe}
OF_THE_COMMAND = ("layer", "model")  # the command's words for cases; it compiles a recipe with --config
