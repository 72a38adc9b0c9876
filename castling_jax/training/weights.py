"""What a run takes from weights that were trained before: its start, and its teacher."""

import os
import re

import jax
import numpy as np

from castling_jax.convert.inference import to_inference
from castling_jax.convert.torch import from_torch
from castling_jax.convert.weights import read
from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables


def initial_variables(path: str | os.PathLike, model: Model, *, reset_head: bool, ema: bool | None = None) -> Variables:
    """What a run of `model` starts from: another run's variables, or weights under timm's names.

    A castling model takes those of a softmax one: both attentions share its q, k and v, and the taps start at zero.

    Args:
      path: as `read` takes it, of weights in training form; of a run those that it exports.
      model: in training form.
      reset_head: as in `from_torch`.
      ema: as in `read`.

    Raises:
      InputError: what is at `path` cannot be read, is in inference form, or does not fit the model.
    """
    return from_torch(model, read(path, ema=ema).state_dict(), reset_head=reset_head)


def teacher_model(name: str, student: Model, *, distilled: bool = False, num_classes: int | None = None) -> Model:
    """The softmax model `name`, abstract, for the student's images and, unless `num_classes` says otherwise, classes.

    With the student's own architecture, where it is the student in softmax form; `distilled`: with a second head.
    """
    spec = student.spec
    given = {"num_classes": num_classes or spec.num_classes, "image_size": spec.image_size, "dtype": spec.dtype}
    given |= dict(spec.overrides) if name == spec.name else {}
    given.pop("mask_kind", None)  # which softmax attention does not have
    given |= {"distilled": distilled} if distilled or given.get("distilled") else {}
    return abstract_model(name, attention="softmax", **given)


def read_teacher(path: str | os.PathLike, name: str, student: Model) -> tuple[Model, Variables]:
    """A trained model, in inference form, that a student of the same images and classes learns from.

    Args:
      path: as `read` takes it.
      name: the model that a file of timm's weights is of, in softmax attention.
      student: gives the size of the images and the number of classes.

    Raises:
      InputError: what is at `path` cannot be read, or has other classes or another image size.
    """
    weights = read(path)
    source, variables = weights.model, weights.variables
    if source is None:
        distilled = any("head_dist" in key for key in variables)
        classifiers = [value for key, value in variables.items() if re.fullmatch(r"head\.(\w+\.)?weight", key)]
        classes = [len(value) for value in classifiers if value.ndim == 2]  # LeViT's has a batch norm beside it
        source = teacher_model(name, student, distilled=distilled, num_classes=(*classes, student.spec.num_classes)[0])
        variables = from_torch(source, variables)
    for word in ("num_classes", "image_size"):
        if getattr(source.spec, word) != getattr(student.spec, word):
            raise InputError(
                f"the teacher '{path}' has {word} = {getattr(source.spec, word)}, which must be that of the model that "
                f"learns from it, {getattr(student.spec, word)}."
            )
    model = abstract_model(**source.spec.arguments(form="inference"))
    return model, jax.tree.map(np.asarray, to_inference(variables))
