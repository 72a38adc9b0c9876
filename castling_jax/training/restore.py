"""What a run has reached, read by others than the run itself: nothing in its folder is touched."""

import dataclasses
import json
import logging

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import MODEL_FILE, load_inference
from castling_jax.convert.torch import from_torch, read_state_dict, to_torch
from castling_jax.errors import InputError
from castling_jax.models.backbone import Backbone
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, check_variables, flatten
from castling_jax.storage import absolute, check_bucket, is_remote, local_copy
from castling_jax.training.checkpoints import CHECKPOINTS, checkpoint_steps, read_checkpoint
from castling_jax.training.config import default_config, exported_weights, model_arguments
from castling_jax.training.config_files import CONFIG_FILE
from castling_jax.training.metrics import METRICS_FILE, read_metrics

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint.

    Attributes:
      folder: the checkpoint's own.
      config: the run's.
      step: how many steps were made.
      mask_threshold: that of its last step.
      classes: the names of the run's classes; None in a checkpoint of an earlier version.
      model: in training form; holds shapes only.
      variables: numpy arrays.
      averaged: whether they are the moving averages.
    """

    folder: epath.Path
    config: ConfigDict
    step: int
    mask_threshold: float
    classes: list[str] | None
    model: Backbone
    variables: Variables
    averaged: bool


def read_snapshot(path: epath.Path, *, ema: bool | None = None) -> Snapshot:
    """Reads a checkpoint.

    Args:
      path: a run's folder, of which the newest checkpoint is read, or the folder of one, RUN/checkpoints/STEP.
      ema: whether the variables are to be their moving averages; None is where it is they that the run exports.

    Raises:
      InputError: it is neither, config.json is missing or damaged, the checkpoint is, or it holds no moving average.
    """
    steps = checkpoint_steps(path / CHECKPOINTS)
    run, step_folder = (path, path / CHECKPOINTS / str(steps[-1])) if steps else (absolute(path).parent.parent, path)
    if not (step_folder / "state").is_dir():
        raise InputError(f"'{path}' is neither a run's folder with checkpoints nor one of its {CHECKPOINTS}/STEP.")
    try:
        config = default_config()
        with config.unlocked():  # an earlier version's may lack fields, and may have others
            given = json.loads((run / CONFIG_FILE).read_text())
            config.update(given)
        arguments, first_threshold = model_arguments(config), given["mask"]["start_threshold"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"'{run / CONFIG_FILE}' is missing or damaged: {error!r}.") from error
    if ema is None:
        ema = exported_weights(config) == "averaged"
    state, about = read_checkpoint(absolute(step_folder), ("ema",) if ema else ("params", "batch_stats"))
    if ema and not state:
        raise InputError(f"the checkpoint '{step_folder}' holds no moving average of its parameters.")
    variables = state["ema"] if ema else state
    heads = [leaf.shape[-1] for name, leaf in flatten(variables["params"]).items() if name.startswith("head/")]
    model = abstract_model(num_classes=heads[-1], **arguments)  # the last one's: batch norm comes before
    check_variables(model, variables)
    step = int(step_folder.name)
    threshold = about.get("mask_threshold")
    if threshold is None:
        threshold = _logged_threshold(run, step, first=first_threshold)
    classes = (about.get("data") or {}).get("classes")
    return Snapshot(step_folder, config, step, threshold, classes, model, variables, ema)


def _logged_threshold(run: epath.Path, step: int, *, first: float) -> float:
    """The mask threshold at a step of an earlier version's run, whose checkpoints do not hold it."""
    logged = [line for line in read_metrics(run) if "mask_threshold" in line and line["step"] <= step]
    threshold = logged[-1]["mask_threshold"] if logged else first
    source = f"as {METRICS_FILE} has it of step {logged[-1]['step']}" if logged else "where the schedule starts"
    _LOGGER.warning(
        "'%s' is an earlier version's run, whose checkpoints do not hold the mask threshold; that of step %d is taken "
        "to be %g, %s.",
        *(run, step, threshold, source),
    )
    return threshold


def initial_variables(path: epath.Path, model: Backbone, *, reset_head: bool) -> Variables:
    """What a run of `model` starts from: another run's variables, or weights under timm's names.

    A castling model takes those of a softmax one: both attentions share its q, k and v, and the taps start at zero.

    Args:
      path: a run's folder or one checkpoint's (the weights that it exports), or a file that `read_state_dict`
        reads.
      model: in training form.
      reset_head: as in `from_torch`.

    Raises:
      InputError: what is at `path` cannot be read, or does not fit the model.
    """
    check_bucket(path)
    if path.is_dir():
        snapshot = read_snapshot(path)
        state_dict = to_torch(snapshot.model, snapshot.variables)
    else:
        state_dict = _read_weights(path)
    return from_torch(model, state_dict, reset_head=reset_head)


def _read_weights(path: epath.Path) -> dict[str, np.ndarray]:
    """`read_state_dict`, of a bucket's file too."""
    if is_remote(path):
        with local_copy(path) as copy:
            return read_state_dict(copy)
    return read_state_dict(path)


def teacher_model(name: str, student: Backbone, *, distilled: bool = False) -> Backbone:
    """The softmax model `name`, abstract, for the student's images and classes.

    With the student's own architecture, where it is the student in softmax form; `distilled`: with a second head.
    """
    spec = student.spec
    given = {"num_classes": spec.num_classes, "image_size": spec.image_size, "dtype": spec.dtype}
    given |= dict(spec.overrides) if name == spec.name else {}
    given |= {"distilled": distilled} if distilled or given.get("distilled") else {}
    return abstract_model(name, attention="softmax", **given)


def read_teacher(path: epath.Path, name: str, student: Backbone) -> tuple[Backbone, Variables]:
    """A trained model, in inference form, that a student of the same images and classes learns from.

    Args:
      path: a run's folder or one checkpoint's, an inference folder, or a file that `read_state_dict` reads.
      name: the model that such a file is of, in softmax attention.
      student: gives the size of the images and the number of classes.

    Raises:
      InputError: what is at `path` cannot be read, or has other classes or another image size.
    """
    check_bucket(path)
    if (path / MODEL_FILE).exists():
        model, variables = load_inference(path)
    elif path.is_dir():
        snapshot = read_snapshot(path)
        model, variables = abstract_model(**snapshot.model.spec.arguments(form="inference")), snapshot.variables
        variables = to_inference(variables)
    else:
        state_dict = _read_weights(path)
        distilled = any("head_dist" in key for key in state_dict)
        source = teacher_model(name, student, distilled=distilled)
        variables = to_inference(from_torch(source, state_dict))
        model = abstract_model(**source.spec.arguments(form="inference"))
    for word in ("num_classes", "image_size"):
        if getattr(model.spec, word) != getattr(student.spec, word):
            raise InputError(
                f"the teacher '{path}' has {word} = {getattr(model.spec, word)}, which must be that of the model that "
                f"learns from it, {getattr(student.spec, word)}."
            )
    return model, jax.tree.map(np.asarray, variables)
