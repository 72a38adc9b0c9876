"""The one reader of weights, for runs, checkpoints, inference folders, shipped weights and foreign files."""

import dataclasses
import logging
import os
from typing import Any

import numpy as np
from etils import epath

from castling_jax.convert.checkpoint import CHECKPOINTS, FORMAT, STEP, checkpoint_steps, read_checkpoint
from castling_jax.convert.files import read_state_dict
from castling_jax.convert.inference_folder import MODEL_FILE, load_inference, read_description
from castling_jax.convert.run_folder import (
    INFERENCE,
    METRICS_FILE,
    exported_weights,
    model_arguments,
    preprocessing_of,
    read_config,
    read_metrics,
    start_threshold,
    suppression_of,
)
from castling_jax.convert.shipped import locate, shipped_names
from castling_jax.convert.torch import to_torch
from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.models.registry import DENSE_MODELS, abstract_model
from castling_jax.models.variables import Variables, flatten, leaves_of
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.storage import absolute, reach_bucket

_LOGGER = logging.getLogger(__name__)
DEFAULT_SUPPRESSION = Suppression()


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights from `read`, and what is known about them.

    The fields config, mask_threshold, step and averaged are None unless the weights come from a checkpoint.

    Attributes:
      path: the checkpoint's folder, inference folder or file that was read.
      variables: the model's variables, nested dicts of arrays. A foreign file names no model; its arrays are here under
        timm's names, as `read_state_dict` returns them, and `from_torch` turns them into a model's variables.
      model: the model in `form`, with shapes only. None for a foreign file.
      config: the fields of the run's config.json, as nested plain dicts.
      mask_threshold: the mask threshold of the checkpoint's last step.
      step: number of training steps before the checkpoint.
      averaged: whether the variables are the moving averages.
      preprocessing: how an image becomes the model's input, for `castling_jax.preprocess`. None for a foreign file, and
        for an inference folder that does not state it.
      classes: names of the model's outputs, in their order. None for a foreign file, for a run on images without
        labels, and for weights of an earlier version that did not save them.
      suppression: how a detector's outputs become detections.
      category_ids: the number of each class in the annotations that a detector learnt from. None for other models, and
        for weights of an earlier version that did not save them.
    """

    path: epath.Path
    variables: Variables
    model: Model | None = None
    config: dict[str, Any] | None = None
    mask_threshold: float | None = None
    step: int | None = None
    averaged: bool | None = None
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    suppression: Suppression = DEFAULT_SUPPRESSION
    category_ids: list[int] | None = None

    @property
    def form(self) -> str | None:
        """The form of model and variables: "train" or "inference"; None for a foreign file."""
        return None if self.model is None else self.model.spec.form

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights under timm's names, for `from_torch` into another model.

        Raises:
          InputError: the weights are in inference form.
        """
        if self.model is None:
            return self.variables
        if self.form == "inference":
            raise InputError(
                f"'{self.path}' is in inference form, whose layers are folded: give the run's folder or a checkpoint."
            )
        return to_torch(self.model, self.variables)


def read(path: str | os.PathLike, *, step: int | None = None, ema: bool | None = None) -> Weights:
    """Reads weights, and what is known about them, without changing anything at `path`.

    Args:
      path: one of these, on this machine or in a bucket (gs://):
        - a run's folder: its newest checkpoint in training form, or its inference folder if it has no checkpoint;
        - the folder of one checkpoint, RUN/checkpoints/STEP;
        - an inference folder, as a run or the convert command writes it;
        - the name of shipped weights, a string without a slash: "digits" ("./digits" is a folder);
        - a foreign file: .safetensors, .npz, or PyTorch's.
      step: the checkpoint of a run to read; None is the newest.
      ema: whether to read the moving averages of a checkpoint's variables; None reads the weights that its run exports.
        For a foreign file, see `read_state_dict`.

    Raises:
      InputError: none of these is at `path`, or it is damaged; the run has no checkpoint of this step; `ema` asks for a
        moving average and there is none; or an argument has the wrong type.
    """
    where = locate(path)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | np.integer)):
        raise InputError(f"step must be an integer, or None for the newest, not {step!r}.")
    if not isinstance(ema, bool | None):
        raise InputError(f"ema must be True, False or None, not {ema!r}.")
    reach_bucket(where)
    steps = checkpoint_steps(where / CHECKPOINTS)
    if step is not None and step not in steps:
        raise InputError(f"'{path}' has no checkpoint of step {step}{_listed(steps)}.")
    if steps:
        return _read_checkpoint(where, where / CHECKPOINTS / str(steps[-1] if step is None else step), ema)
    if STEP.fullmatch(absolute(where).name) and (where / "state").is_dir():
        return _read_checkpoint(absolute(where).parent.parent, where, ema)
    # Checkpoints come first: a finished run has both, and only the training form can be turned into the other form.
    if inference := next((folder for folder in (where, where / INFERENCE) if (folder / MODEL_FILE).is_file()), None):
        if ema:
            raise InputError(f"'{inference}' holds no moving average, which only checkpoints do.")
        model, variables = load_inference(inference)
        known = read_description(inference)
        return Weights(
            inference,
            variables,
            model,
            preprocessing=known.preprocessing,
            classes=known.classes,
            suppression=known.suppression or DEFAULT_SUPPRESSION,
            category_ids=known.category_ids,
        )
    if where.is_file():
        return Weights(where, read_state_dict(where, ema=ema))
    raise InputError(
        f"'{path}' is neither a run's folder with checkpoints, one of its {CHECKPOINTS}/STEP, an inference folder, "
        f"a file of weights, nor the name of shipped weights ({', '.join(shipped_names()) or 'none yet'}): "
        + ("it is another folder." if where.exists() else "there is nothing of this name.")
    )


def _listed(steps: list[int]) -> str:
    return f"; its checkpoints are of the steps {', '.join(map(str, steps))}" if steps else ""


def _read_checkpoint(run: epath.Path, folder: epath.Path, ema: bool | None) -> Weights:
    config = read_config(run)
    if ema is None:
        ema = exported_weights(config) == "averaged"
    # The optimiser's state is not read: it is twice as large as the parameters.
    try:
        state, about = read_checkpoint(absolute(folder), ("ema",) if ema else ("params", "batch_stats"))
    except InputError as error:
        others = [step for step in checkpoint_steps(folder.parent) if str(step) != absolute(folder).name]
        instead = f"; try '{folder.parent / str(others[-1])}'" if others else ""
        raise InputError(f"{str(error).rstrip('.')}{instead}.") from error
    if ema and not state:
        raise InputError(f"the checkpoint '{folder}' holds no moving average of its parameters.")
    if (written_as := about.get("format", 1)) > FORMAT:
        raise InputError(f"'{folder}' has format {written_as}; this version reads formats up to {FORMAT}.")
    variables = state["ema"] if ema else state
    # The configuration does not state the number of classes, and checkpoints of earlier versions do not name them. The
    # shape of a classifier's head tells it: the last array, because LeViT's head starts with a batch norm.
    data = about.get("data") or {}
    classes = data.get("classes") or None  # none: a run on images without labels
    heads = [leaf.shape[-1] for name, leaf in flatten(variables["params"]).items() if name.startswith("head/")]
    is_detector = config["model"]["name"] in DENSE_MODELS
    num_classes = len(classes or ()) if is_detector else heads[-1]
    model = abstract_model(num_classes=num_classes or None, **model_arguments(config))
    leaves_of(model, variables)
    step = int(absolute(folder).name)
    threshold = about.get("mask_threshold")
    if threshold is None:
        threshold = _logged_threshold(run, step, first=start_threshold(config["mask"]))
    preprocessing = preprocessing_of(config, model.spec.image_size)
    suppression = suppression_of(config)
    known = (preprocessing, classes, suppression, data.get("category_ids"))
    return Weights(folder, variables, model, config, threshold, step, ema, *known)


def _logged_threshold(run: epath.Path, step: int, *, first: float) -> float:
    """The mask threshold at a step, from the log of an earlier version's run, whose checkpoints do not hold it."""
    logged = [line for line in read_metrics(run) if "mask_threshold" in line and line["step"] <= step]
    threshold = logged[-1]["mask_threshold"] if logged else first
    source = f"its value at step {logged[-1]['step']} in {METRICS_FILE}" if logged else "the schedule's first value"
    _LOGGER.warning(
        "'%s' is an earlier version's run, whose checkpoints do not hold the mask threshold; for step %d it is "
        "taken to be %g, %s.",
        run,
        step,
        threshold,
        source,
    )
    return threshold
