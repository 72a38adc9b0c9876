"""A run's start from weights that were trained before, and its teacher."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.convert.inference import to_inference
from castling_jax.convert.names import listed
from castling_jax.convert.torch import backbone_to_torch, from_torch
from castling_jax.convert.weights import Weights, read
from castling_jax.data.fingerprint import check_same_classes
from castling_jax.errors import InputError, about
from castling_jax.models.model import Model
from castling_jax.models.registry import DENSE_MODELS, MODELS, abstract_model, backbone_classifier, create_model
from castling_jax.models.variables import Variables, flatten, get_variables, unflatten
from castling_jax.preprocessing import Preprocessing

_FIXED_POSITIONS = "params/decoder_pos_embed"
Shape = tuple[int, ...]
# Arguments that change no array's name or shape, and those with which arrays are resized or start anew.
_FIT_ANYWAY = {
    *("num_classes", "image_size", "backbone", "backbone_arguments", "drop_path_rate", "remat", "implementation"),
    *("mask_kind", "mask_ratio", "norm_pix_loss", "init_std", "fixed_positions", "global_pool", "qkv_pool"),
}
# These may change no array's shape either, but the arrays' columns then belong to other heads.
_HEADS = ("num_heads", "decoder_num_heads")


def initial_variables(
    path: str | os.PathLike, model: Model, *, reset_head: bool, ema: bool | None = None, seed: int = 0
) -> Variables:
    """The variables that a run of `model` starts from: another run's, or weights under timm's names.

    A castling model can start from a softmax model's weights: both of its branches use the same q, k and v, and its
    taps start at zero. Positions for another image size are resized.

    A model on a backbone takes its backbone from a classifier, or from any model on this backbone. It takes its neck,
    head or decoder from a run for the same task; otherwise they are drawn with the key of `seed`. A classifier that
    starts from a model on a backbone has a new head.

    Args:
      path: weights in training form, as `read` takes them; for a run, the weights that it exports.
      model: the model to train, in training form.
      reset_head: whether the layers whose sizes depend on the classes start anew, as in `from_torch`; in a model on a
        backbone, all layers of other sizes beside the backbone.
      ema: as in `read`.
      seed: seed of the layers that are drawn.

    Raises:
      InputError: the weights cannot be read, are in inference form, or do not fit the model; they are of a run with
        another number of heads; or layers beside the backbone have other sizes, and `reset_head` is not set.
    """
    weights = read(path, ema=ema)
    # Through timm's names even from a run of ours, so that attentions, image sizes and classes may differ.
    state_dict, source = _backbone_of(weights)
    is_headless = source is not weights.model
    with _naming_the_cause(path, weights.model, model):
        _check_heads(weights.model, model)
        if not _has_backbone(model):
            return from_torch(model, state_dict, reset_head=reset_head or is_headless, source=source)
        # The backbone as a classifier of any number of classes, whose head is left out.
        pretrained = flatten(from_torch(backbone_classifier(model), state_dict, reset_head=True, source=source))
    leaves = _drawn(model, seed)
    leaves |= {name: pretrained[name.replace("/backbone/", "/", 1)] for name in leaves if _is_of_backbone(name)}
    if weights.model is not None and weights.model.task == model.task:
        leaves |= _beside_backbone(path, weights.model, weights.variables, model, reset_head=reset_head)
    return unflatten(leaves)


def _check_heads(source: Model | None, model: Model) -> None:
    """Raises an InputError if the weights are of the model's backbone, or decoder, with another number of heads."""
    if source is None or _backbone_name(source) != _backbone_name(model):
        return
    if {*_HEADS} & _differences(source, model).keys():
        raise InputError("its heads read other columns of the arrays than this model's")


def _backbone_of(weights: Weights) -> tuple[dict[str, np.ndarray], Any]:
    """(arrays under timm's names, the model that they belong to): of a model on a backbone, the backbone's alone."""
    model: Any = weights.model
    # `state_dict` refuses the inference form.
    if model is None or weights.form == "inference" or not _has_backbone(model):
        return weights.state_dict(), model
    return backbone_to_torch(model, weights.variables), model.backbone


def _beside_backbone(
    path: str | os.PathLike, source: Model, variables: Variables, model: Model, *, reset_head: bool
) -> dict[str, jax.Array]:
    """The arrays of a neck, head or decoder that fit `model`, by path.

    Raises:
      InputError: some do not fit, and `reset_head` is not set.
    """
    # The positions of a masked autoencoder's decoder are fixed: the model has its own, for its image size.
    theirs, ours = (
        {name: leaf for name, leaf in flatten(tree).items() if not _is_of_backbone(name) and name != _FIXED_POSITIONS}
        for tree in (variables, get_variables(model))
    )
    shapes = {name: tuple(getattr(tree.get(name), "shape", None) for tree in (theirs, ours)) for name in theirs | ours}
    # An array that only one of the models has counts as one of another size.
    misfits = {name: pair for name, pair in sorted(shapes.items()) if pair[0] != pair[1]}
    if misfits and not reset_head:
        raise InputError(_misfitting(path, source, model, misfits))
    return {name: jnp.asarray(theirs[name], ours[name].dtype) for name in shapes.keys() - misfits}


def _misfitting(
    path: str | os.PathLike, source: Model, model: Model, misfits: Mapping[str, tuple[Shape | None, ...]]
) -> str:
    """Why arrays of a neck, head or decoder do not fit, and what to do; misfits is path -> (their shape, ours)."""
    own = vars(DENSE_MODELS[model.spec.name][1])  # without the backbone's, which fits
    sizes = {word: pair for word, pair in _differences(source, model).items() if word in own}
    if not sizes:
        return (
            f"'{path}' has {source.spec.num_classes:,} classes and the model {model.spec.num_classes:,}: set "
            "config.reset_head = True, which starts the layers of other sizes in the head anew."
        )
    parts = sorted({name.split("/")[1] for name in misfits})
    arrays = [f"{name!r} is {old or 'absent'}, not {new or 'absent'}" for name, (old, new) in misfits.items()]
    return (
        f"{_compared(path, sizes)}, so that arrays of its {', '.join(parts)} have other sizes: set {_fields(sizes)} as "
        f"in that run, or config.reset_head = True, which starts the layers of other sizes anew ({listed(arrays)})."
    )


@contextlib.contextmanager
def _naming_the_cause(path: str | os.PathLike, source: Model | None, model: Model) -> Iterator[None]:
    """Makes the message of weights that do not fit begin with how their model differs from `model`."""
    try:
        yield
    except InputError as error:
        cause = "" if source is None else _cause(path, source, model)
        subject = f"'{path}'" if source is None else f"'{path}', a {source.spec.name}"
        text = f"{cause} ({str(error).rstrip('.')})." if cause else f"{subject}: {error}"
        raise InputError(text) from error


def _cause(path: str | os.PathLike, source: Model, model: Model) -> str:
    """Why a run's weights do not fit, and what to do; "" if that is not known."""
    theirs, ours = _backbone_name(source), _backbone_name(model)
    if theirs == ours:
        sizes = _differences(source, model)
        return f"{_compared(path, sizes)}: set {_fields(sizes)} as in that run" if sizes else ""
    if not _has_backbone(source):
        return ""
    this, field = ("this model's backbone is", "backbone") if _has_backbone(model) else ("this model is a", "name")
    return (
        f"'{path}' is a {source.spec.name} on {theirs}, and {this} {ours}: set config.model.{field} and its sizes as "
        "in that run"
    )


def _differences(source: Model, model: Model) -> dict[str, tuple[Any, Any]]:
    """The arguments that both models have and in which they differ, by name, with both values."""
    theirs, ours = _arguments(source), _arguments(model)
    return {word: (theirs[word], ours[word]) for word in theirs if word in ours and theirs[word] != ours[word]}


def _arguments(model: Model) -> dict[str, Any]:
    """The arguments of a model and its backbone that give arrays their sizes, side by side as in config.model."""
    spec, given = model.spec, dict(model.spec.overrides)
    arguments = dict(vars(MODELS[_backbone_name(model)][1]))
    if _has_backbone(model):
        arguments |= vars(DENSE_MODELS[spec.name][1])
    arguments |= given | dict(given.get("backbone_arguments", ()))
    has_taps = any(name.endswith("/token_kernel") for name in flatten(get_variables(model)))
    left_out = _FIT_ANYWAY if has_taps else {*_FIT_ANYWAY, "token_conv", "token_kernel_size"}
    return {word: value for word, value in arguments.items() if word not in left_out}


def _compared(path: str | os.PathLike, sizes: dict[str, tuple[Any, Any]]) -> str:
    theirs, ours = (", ".join(f"{word} = {pair[i]!r}" for word, pair in sizes.items()) for i in (0, 1))
    return f"'{path}' has {theirs}, and this model {ours}"


def _fields(sizes: dict[str, tuple[Any, Any]]) -> str:
    return " and ".join(f"config.model.{word}" for word in sizes)


def _has_backbone(model: Model) -> bool:
    return "backbone" in dict(model.spec.overrides)


def _backbone_name(model: Model) -> str:
    return dict(model.spec.overrides).get("backbone", model.spec.name)


def _is_of_backbone(name: str) -> bool:
    return name.split("/")[1] == "backbone"


def _drawn(model: Model, seed: int) -> dict[str, Any]:
    """Random variables of a model, by path."""
    return flatten(get_variables(create_model(rngs=nnx.Rngs(seed), **model.spec.arguments())))


def teacher_model(name: str, student: Model, *, distilled: bool = False, num_classes: int | None = None) -> Model:
    """The softmax model `name`, with shapes only, for the student's images and classes.

    If `name` is the student's own model, the teacher has the student's other arguments too.

    Args:
      name: name of the teacher's model.
      student: the model that learns.
      distilled: whether the teacher has a second head.
      num_classes: number of the teacher's classes; None takes the student's.
    """
    spec = student.spec
    arguments = {"num_classes": num_classes or spec.num_classes, "image_size": spec.image_size, "dtype": spec.dtype}
    arguments |= dict(spec.overrides) if name == spec.name else {}
    arguments.pop("mask_kind", None)  # softmax attention does not take it
    # Set only if needed, because not every model takes `distilled`.
    arguments |= {"distilled": distilled} if distilled or arguments.get("distilled") else {}
    return abstract_model(name, attention="softmax", **arguments)


def read_teacher(
    path: str | os.PathLike, name: str, student: Model, preprocessing: Preprocessing, classes: Sequence[str]
) -> tuple[Model, Variables]:
    """Reads a trained model, in inference form, for a student with the same images and classes.

    Args:
      path: the teacher's weights, as `read` takes them.
      name: the softmax model that the weights belong to, for a file of timm's; other weights name their model.
      student: the model that learns; the teacher must have its image size and number of classes.
      preprocessing: how an image becomes the student's input, which the teacher gets too.
      classes: names of the student's classes, in their order.

    Raises:
      InputError: the weights cannot be read, or the model has other classes, another image size, or is known to take
        other pixels.
    """
    weights = read(path)
    source, variables = weights.model, weights.variables
    if source is None:
        distilled = any("head_dist" in key for key in variables)
        classifiers = [value for key, value in variables.items() if re.fullmatch(r"head\.(\w+\.)?weight", key)]
        sizes = [len(value) for value in classifiers if value.ndim == 2]  # not LeViT's batch norm, which is 1-D
        source = teacher_model(name, student, distilled=distilled, num_classes=(*sizes, student.spec.num_classes)[0])
        variables = from_torch(source, variables)
    pairs: list[tuple[str, object, object]] = [
        (word, source.spec, student.spec) for word in ("num_classes", "image_size")
    ]
    if weights.preprocessing is not None:
        pairs += [(word, weights.preprocessing, preprocessing) for word in ("mean", "std", "exif")]
    for word, theirs, ours in pairs:
        if getattr(theirs, word) != getattr(ours, word):
            raise InputError(
                f"the teacher '{path}' has {word} = {getattr(theirs, word)}, but the model that learns from it has "
                f"{getattr(ours, word)}."
            )
    if weights.classes is not None:
        with about(f"the teacher '{path}'"):
            check_same_classes(weights.classes, list(classes), remedy="give a teacher of these classes, in this order")
    model = abstract_model(**source.spec.arguments(form="inference"))
    return model, jax.tree.map(np.asarray, to_inference(variables))
