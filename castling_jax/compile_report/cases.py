"""What tpu_report compiles: a user's function, an attention layer of DeiT-B, a whole model, what a config runs."""

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
from castling_jax.convert.run_folder import model_arguments
from castling_jax.data.sources import Dataset, Unread, load_dataset
from castling_jax.errors import InputError, check_at_least, check_known
from castling_jax.models.attention.core import Kind
from castling_jax.models.attention.kinds import FORMS, KINDS, make_core
from castling_jax.models.layers import add_bias
from castling_jax.models.macs import count_macs
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, get_variables
from castling_jax.storage import as_path
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.task import Teacher
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.overrides import load_overridden
from castling_jax.training.schedules import learning_rate_schedule
from castling_jax.training.setup import named_splits, set_up
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

CHANNELS, HEADS, TAPS = 768, 12, 9  # of DeiT-B
# Classes, training and held-out images of data sets, which a step depends on by its last layer and its schedule alone.
PUBLISHED_SIZES = {"imagenet2012": (1000, 1_281_167, 50_000), "fashion_mnist": (10, 60_000, 10_000)}


class Case(NamedTuple):
    """What is compiled.

    Whatever varies from call to call is an argument, the cotangent and the threshold too: of constants, the compiler
    drops what they make needless.

    Attributes:
      function: of the arguments.
      arguments: trees of the shapes it is compiled for.
      jit_options: what jax.jit is told besides.
      mesh: that it is traced on.
      held: what of the arguments is the parameters, the optimiser's and so on: kinds -> trees.
      facts: what a report tells of it.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    jit_options: Mapping[str, Any] = MappingProxyType({})
    mesh: Mesh | None = None
    held: Mapping[str, Any] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})


def load_case(what: str, options: dict[str, Any], devices: list[Any]) -> Case:
    """A case by its name or from a file.

    Args:
      what: "layer", "model" or "FILE.py:NAME".
      options: keyword arguments of `layer` or `model`.
      devices: that it is compiled for; NAME in FILE.py gets them if it has an argument of that name.

    Raises:
      InputError: there is no such case, option or file, or NAME does not return what it should.
    """
    if what in CASES:
        words = list(inspect.signature(CASES[what]).parameters)
        given = {"devices": devices} if "devices" in words else {}
        for word in options:
            check_known(f"option of {what}", word, [known for known in words if known not in given])
        return CASES[what](**options, **given)
    if ":" not in what:
        check_known("case", what, [*CASES, "FILE.py:NAME"])
    if options:
        raise InputError(f"--{next(iter(options))} is an option of {' and '.join(CASES)}, not of a function in a file.")
    return _from_file(what, devices)


def _from_file(what: str, devices: list[Any]) -> Case:
    path, name = what.rsplit(":", 1)
    path = str(as_path(path))
    if not Path(path).is_file():
        raise InputError(f"there is no file '{path}'.")
    sys.path[:0] = [str(Path.cwd()), str(Path(path).resolve().parent)]
    spec = importlib.util.spec_from_file_location("case", path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_known(f"function of '{path}'", name, [word for word, value in vars(module).items() if callable(value)])
    make = getattr(module, name)
    made = make(devices=devices) if "devices" in inspect.signature(make).parameters else make()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise InputError(f"{what} must return (function, arguments) or (function, arguments, jit options).")
    return Case(*made)


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

    With form="train" it is forward and backward, to all weights and to the layer's input. An attention with a module or
    parameters of its own is that module, its tokens on the largest square grid, and the rest before it.
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
    """A whole model that computes in bfloat16, its parameters float32.

    With form="inference" it is the forward pass. With form="train" it is the training step of the training form:
    forward, backward and AdamW's update, the state donated; the threshold is under 1. With `remat` the backward pass
    computes again what is inside a block. With a `mesh` such as "data:64,fsdp:4" the step is the one that pods run:
    `devices` along its axes, the state where `state_shardings` has it, and `batch` the images of all devices together.
    """
    _check_positive(image_size=image_size, batch=batch)
    if mesh is not None and form != "train":
        raise InputError("--mesh splits the training step: it needs --form=train.")
    words: dict[str, Any] = {} if depth is None else {"depth": depth}
    built = abstract_model(
        name, attention=attention, form=form, image_size=image_size, dtype=jnp.bfloat16, remat=remat, **words
    )
    size = built.spec.image_size
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = get_variables(built)
    if form == "inference":
        return Case(functools.partial(apply, built), (variables, images))

    config = default_config()
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
    step = make_train_step(built, optimizer, task, shardings=shardings)
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
      config: as `load_config` takes it.
      fields: --config.GROUP.FIELD=VALUE, which override it.
      form: "train" or "inference".
      attention: in place of the configuration's.
      image_size: likewise, in pixels.
      batch: images of each device, in place of the configuration's batch of all devices.
      remat: in place of the configuration's: whether the backward pass computes blocks again.
      mesh: as `read_mesh` takes it, in place of the configuration's.
      devices: along the mesh's axes.
    """
    check_known("form", form, FORMS)
    if attention is not None:
        check_known("attention", attention, KINDS)
    _check_positive(image_size=image_size, batch=batch)
    settings = load_overridden(config, fields)
    chosen = {"attention": attention, "image_size": image_size, "remat": remat}
    settings.model.update({word: value for word, value in chosen.items() if value is not None})
    if attention is not None and not KINDS[attention].takes("mask_kind"):
        settings.mask.kind = "threshold"  # a fade is castling's
    if mesh is not None:
        settings.mesh.update(read_mesh(mesh))
    if batch is not None:
        settings.train.batch_size = batch * len(devices)
    evaluated = settings.evaluation.batch_size
    settings.evaluation.batch_size = settings.train.batch_size or evaluated  # which is not compiled
    datasets, assumed = _datasets(settings)
    teacher, taught_by = _teacher(settings, datasets[0].num_classes)
    made = set_up(settings, devices, datasets, teacher)
    spec, images, placed = made.model.spec, made.config.train.batch_size, made.mesh
    try:
        check_batch("config.evaluation.batch_size", evaluated, placed)
    except InputError as error:
        assumed = [*assumed, f"main.py would refuse to evaluate: {error}"]
    shapes = batch_shapes(made.task.example_shapes(spec.image_size), images, placed)
    facts = {
        **{"model": spec.name, "attention": spec.attention, "image_size": spec.image_size, "form": form},
        **{"mesh": dict(placed.shape), "images": images, "images_per_device": images / len(devices)},
        **{"assumed": assumed + taught_by * (form == "train")},
    }

    def whole(variables: Variables) -> Variables:
        return with_shardings(variables, whole_over_fsdp(state_shardings(variables, placed)))

    if form == "train":
        state = with_shardings(made.state, made.shardings)
        threshold = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(placed))
        taught = {} if teacher is None else whole(teacher.variables)
        held = {
            **{"parameters": state.params, "optimiser": state.opt_state, "moving averages": state.ema},
            **{"batch statistics": state.batch_stats, "teacher": taught, "images and labels": shapes},
        }
        arguments = state, shapes, threshold, taught
        facts |= {"macs": count_macs(made.model)}
        return Case(made.train_step, arguments, {"donate_argnums": 0}, placed, held, facts)
    model = abstract_model(**spec.arguments(form="inference"))
    variables = whole(get_variables(model))
    held = {"parameters": variables, "images": shapes["image"]}
    facts |= {"macs": count_macs(model)}
    return Case(functools.partial(apply, model), (variables, shapes["image"]), {}, placed, held, facts)


def _teacher(config: ConfigDict, classes: int) -> tuple[Teacher | None, list[str]]:
    """A configuration's teacher, of shapes alone, and a sentence that says what was taken for it."""
    options = config.distillation
    if options.kind is None:
        return None, []
    student = abstract_model(num_classes=classes, **model_arguments(config))
    source = teacher_model(options.name or student.spec.name, student)
    model = abstract_model(**source.spec.arguments(form="inference"))
    said = f"the teacher is {model.spec.name} in softmax attention, no weights were read; MFU is without its operations"
    return Teacher(model, get_variables(model), options.kind, options.alpha, options.temperature), [said]


def _datasets(config: ConfigDict) -> tuple[tuple[Dataset, Dataset], list[str]]:
    """A configuration's data sets; stand-ins where they are not here, and a sentence that says so."""
    data = config.dataset
    try:
        train_set, eval_set = (load_dataset(data.name, split, data_dir=data.data_dir) for split in named_splits(data))
        return (train_set, eval_set), []
    except InputError:
        if data.name not in PUBLISHED_SIZES:
            raise
    classes, train, held_out = PUBLISHED_SIZES[data.name]
    said = f"{data.name} is not here: its published {train:,} images and {classes:,} classes are taken"
    return (Unread(train, classes), Unread(held_out, classes)), [said]


def read_mesh(text: str) -> dict[str, int]:
    """Sizes of all axes of a mesh, of a text such as "data:64,fsdp:-1"; those it leaves out are 1.

    Raises:
      InputError: there is no such axis, or it is not written so.
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
