"""A run's start from weights that were trained before, and its teacher."""

import os
import re
from typing import Any

import jax
import numpy as np
from flax import nnx

from castling_jax.convert.inference import to_inference
from castling_jax.convert.torch import from_torch
from castling_jax.convert.weights import read
from castling_jax.errors import InputError, about
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model, backbone_classifier, create_model
from castling_jax.models.variables import Variables, flatten, get_variables, leaves_of, unflatten


def initial_variables(
    path: str | os.PathLike, model: Model, *, reset_head: bool, ema: bool | None = None, seed: int = 0
) -> Variables:
    """The variables that a run of `model` starts from: another run's, or weights under timm's names.

    A castling model can start from a softmax model's weights: both of its branches use the same q, k and v, and its
    taps start at zero. A detector or a segmenter can start from another one, for other classes with `reset_head`. A
    model on a backbone can start from a classifier's or a masked autoencoder's weights, which become its backbone's;
    all else is drawn with the key of `seed`. A classifier that starts from a masked autoencoder has a new head.

    Args:
      path: weights in training form, as `read` takes them; for a run, the weights that it exports.
      model: the model to train, in training form.
      reset_head: whether the layers whose sizes depend on the classes start anew, as in `from_torch`.
      ema: as in `read`.
      seed: seed of what is beside the backbone, where the weights have none.

    Raises:
      InputError: the weights cannot be read, are in inference form, or do not fit the model; or they have other
        classes, and `reset_head` is not set.
    """
    weights = read(path, ema=ema)
    spec, source = model.spec, weights.model
    if source is not None and source.task == model.task and "backbone" in dict(spec.overrides):
        leaves = flatten(weights.variables)
        expected = flatten(get_variables(model))
        of_classes = [
            name
            for name, leaf in expected.items()
            if "/head/" in name and name in leaves and leaves[name].shape != leaf.shape
        ]
        if of_classes and not reset_head:
            raise InputError(
                f"'{path}' has {source.spec.num_classes:,} classes and the model {spec.num_classes:,}: set "
                "config.reset_head = True, which starts the layers of other sizes in the head anew."
            )
        if of_classes:
            drawn = _drawn(model, seed)
            leaves |= {name: drawn[name] for name in of_classes}
        variables = unflatten(leaves)
        leaves_of(model, variables)
        return variables
    # Through timm's names even from a run of ours, so that attentions, image sizes and classes may differ.
    state_dict = weights.state_dict()
    with about(f"'{path}'" if source is None else f"'{path}', a {source.spec.name}"):
        if "backbone" not in dict(spec.overrides):
            is_headless = source is not None and source.task == "reconstruction"
            return from_torch(model, state_dict, reset_head=reset_head or is_headless)
        # The backbone as a classifier of any number of classes, whose head is left out.
        pretrained = flatten(from_torch(backbone_classifier(model), state_dict, reset_head=True))
    drawn = _drawn(model, seed)
    return unflatten({path: pretrained.get(path.replace("/backbone/", "/", 1), leaf) for path, leaf in drawn.items()})


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


def read_teacher(path: str | os.PathLike, name: str, student: Model) -> tuple[Model, Variables]:
    """Reads a trained model, in inference form, for a student with the same image size and classes.

    Args:
      path: the teacher's weights, as `read` takes them.
      name: the softmax model that the weights belong to, for a file of timm's; other weights name their model.
      student: the model that learns; the teacher must have its image size and number of classes.

    Raises:
      InputError: the weights cannot be read, or the model has other classes or another image size.
    """
    weights = read(path)
    source, variables = weights.model, weights.variables
    if source is None:
        distilled = any("head_dist" in key for key in variables)
        classifiers = [value for key, value in variables.items() if re.fullmatch(r"head\.(\w+\.)?weight", key)]
        classes = [len(value) for value in classifiers if value.ndim == 2]  # not LeViT's batch norm, which is 1-D
        source = teacher_model(name, student, distilled=distilled, num_classes=(*classes, student.spec.num_classes)[0])
        variables = from_torch(source, variables)
    for word in ("num_classes", "image_size"):
        if getattr(source.spec, word) != getattr(student.spec, word):
            raise InputError(
                f"the teacher '{path}' has {word} = {getattr(source.spec, word)}, but the model that learns from it "
                f"has {getattr(student.spec, word)}."
            )
    model = abstract_model(**source.spec.arguments(form="inference"))
    return model, jax.tree.map(np.asarray, to_inference(variables))
