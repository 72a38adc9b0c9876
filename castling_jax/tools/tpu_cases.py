"""What tpu_report compiles: a function of the user's, an attention layer of DeiT-B, or a whole model."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from castling_jax.models.attention import ATTENTIONS, FORMS, attend
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import apply, get_variables
from castling_jax.ops.checks import check_implementation
from castling_jax.ops.errors import InputError, check_known
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.schedules import learning_rate_schedule
from castling_jax.training.state import create_state
from castling_jax.training.step import make_train_step

CHANNELS, HEADS, TAPS = 768, 12, 9  # of DeiT-B


class Case(NamedTuple):
    """A function, the shapes it is compiled for, and what jax.jit is told besides.

    Whatever varies from call to call is an argument, the cotangent and the threshold too: of constants, the compiler
    drops what they make needless.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    jit_options: Mapping[str, Any] = MappingProxyType({})


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
        for word in options:
            check_known(f"option of {what}", word, words)
        return CASES[what](**options)
    if ":" not in what:
        check_known("case", what, [*CASES, "FILE.py:NAME"])
    if options:
        raise InputError(f"--{next(iter(options))} is an option of {' and '.join(CASES)}, not of a function in a file.")
    return _from_file(what, devices)


def _from_file(what: str, devices: list[Any]) -> Case:
    path, name = what.rsplit(":", 1)
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
        if size is not None and size < 1:
            raise InputError(f"--{word} must be at least 1, not {size}.")


def layer(
    *,
    form: str = "inference",
    tokens: int = 197,
    batch: int = 128,
    attention: str = "castling",
    implementation: str = "auto",
) -> Case:
    """The attention layer of DeiT-B in bfloat16: its three input projections, the attention, the output projection.

    With form="train" it is forward and backward, to all weights and to the layer's input.
    """
    check_known("form", form, FORMS)
    check_known("attention", attention, ATTENTIONS)
    check_implementation(implementation)
    _check_positive(tokens=tokens, batch=batch)
    if implementation == "pallas" and attention not in ("castling", "linear_angular"):
        raise InputError(f'there are no Pallas kernels of {attention} attention: leave --implementation at "auto".')
    linear = {"kernel": _bfloat16(CHANNELS, CHANNELS), "bias": _bfloat16(CHANNELS)}
    weights = {"q": linear, "k": linear, "v": linear, "proj": linear, "token_kernel": _bfloat16(TAPS, HEADS)}
    x = _bfloat16(batch, tokens, CHANNELS)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    run = functools.partial(_run_layer, attention=attention, form=form, implementation=implementation)
    if form == "inference":
        return Case(run, (weights, x, threshold))

    def run_and_differentiate(weights, x, cotangent, threshold):
        out, backward = jax.vjp(lambda weights, x: run(weights, x, threshold), weights, x)
        return out, backward(cotangent)

    return Case(run_and_differentiate, (weights, x, x, threshold))


def _run_layer(weights, x, threshold, *, attention: str, form: str, implementation: str) -> jax.Array:
    def project(x, name):
        return x @ weights[name]["kernel"] + weights[name]["bias"]

    q, k, v = (project(x, name).reshape(*x.shape[:2], HEADS, CHANNELS // HEADS) for name in "qkv")
    taps = weights["token_kernel"]
    out, _ = attend(
        q, k, v, taps, attention=attention, form=form, mask_threshold=threshold, implementation=implementation
    )
    return project(out.reshape(x.shape), "proj")


def model(
    *,
    name: str = "deit_base",
    image_size: int | None = None,
    batch: int = 128,
    form: str = "inference",
    attention: str = "castling",
    remat: bool = False,
) -> Case:
    """A whole model that computes in bfloat16, its parameters float32.

    With form="inference" it is the forward pass. With form="train" it is the training step of the training form:
    forward, backward and AdamW's update, the state donated; the threshold is under 1. With `remat` the backward pass
    computes again what is inside a block.
    """
    _check_positive(image_size=image_size, batch=batch)
    built = abstract_model(name, attention=attention, form=form, image_size=image_size, dtype=jnp.bfloat16, remat=remat)
    size = built.spec.image_size
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = get_variables(built)
    if form == "inference":
        return Case(functools.partial(apply, built), (variables, images))

    config = default_config()
    rate = learning_rate_schedule(config.optimizer, total_steps=100_000, steps_per_epoch=1_000)
    optimizer = make_optimizer(config.optimizer, rate)
    state = jax.eval_shape(lambda variables: create_state(variables, optimizer, config.seed), variables)
    step = make_train_step(built, optimizer, label_smoothing=config.loss.label_smoothing)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    return Case(step, (state, {"image": images, "label": labels}, threshold), {"donate_argnums": 0})


CASES: dict[str, Callable[..., Case]] = {"layer": layer, "model": model}
