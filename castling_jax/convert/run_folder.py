"""The files in a run's folder that describe its checkpoints: config.json and the log, metrics.jsonl."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from castling_jax.errors import InputError, about, refusing
from castling_jax.models.registry import with_backbone_arguments
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import ImageSize
from castling_jax.storage import write_atomically

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
INFERENCE = "inference"  # the inference folder in a run's folder
START_THRESHOLDS = {"threshold": 0.02, "fade": 0.0}  # by mask.kind; the paper authors' block has 0.02
FORMAT = 1  # the format of config.json; a file that states none has format 1 too
_LOGGER = logging.getLogger(__name__)


def write_config(run: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes RUN/config.json: its format, and the configuration's fields as nested objects."""
    write_atomically(run / CONFIG_FILE, json.dumps({"format": FORMAT, **config}, indent=2).encode())


def read_config(run: epath.Path) -> dict[str, Any]:
    """The fields of RUN/config.json, nested. A file from an earlier version may lack fields, and may have others.

    Raises:
      InputError: the file is missing, is damaged, has another format, or does not describe the run's model.
    """
    path = run / CONFIG_FILE
    damage = (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError)
    with refusing(damage, f"'{path}' is missing or damaged"):
        config = json.loads(path.read_text())
        written_as = config.pop("format", FORMAT)
        if written_as == FORMAT:  # call what the readers of a run will call, so that they meet no damage later
            model_arguments(config), exported_weights(config), start_threshold(config["mask"])
            config["dataset"].keys()
    if written_as != FORMAT:
        raise InputError(f"'{path}' has format {written_as}; this version reads format {FORMAT}.")
    with about(f"'{path}' is damaged"):
        preprocessing_of(config, image_size=1)
    return config


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create_model` in a configuration or a run's config.json."""
    arguments = {name: value for name, value in config["model"].items() if value is not None}
    if arguments.get("token_conv") == "none":
        arguments["token_conv"] = None
    if mask_kind(config) != "threshold":  # only castling models take mask_kind, and "threshold" is their default
        arguments["mask_kind"] = mask_kind(config)
    return with_backbone_arguments(arguments)


def mask_kind(config: Mapping[str, Any]) -> str:
    """How a run empties the softmax branch; runs of earlier versions always use a threshold."""
    return config["mask"].get("kind", "threshold")


def start_threshold(mask: Mapping[str, Any]) -> float:
    """A run's first mask threshold, from its configuration's group `mask`; each mask kind has its default."""
    start = mask["start_threshold"]
    return START_THRESHOLDS[mask.get("kind", "threshold")] if start is None else float(start)


def preprocessing_of(config: Mapping[str, Any], image_size: ImageSize) -> Preprocessing:
    """The preprocessing of a run's evaluation, from its configuration or its config.json.

    Fields that an earlier version's config.json lacks get `Preprocessing`'s defaults.
    """
    data = config["dataset"]
    names = ("mean", "std", "crop_ratio", "crop_mode", "interpolation", "exif")
    return Preprocessing(image_size, **{name: data[name] for name in names if name in data})


def suppression_of(config: Mapping[str, Any]) -> Suppression:
    """A detector's suppression in a run, from its configuration; an earlier version's config.json has the defaults."""
    options = config["evaluation"]
    names = [field.name for field in dataclasses.fields(Suppression)]
    return Suppression(**{name: options[name] for name in names if name in options})


def exported_weights(config: Mapping[str, Any]) -> str:
    """The weights that a run exports, and that choose its best checkpoint: "raw" or "averaged"."""
    train = config["train"]
    if train.get("export") is not None:  # earlier versions have no such field
        return train["export"]
    return "raw" if train.get("ema_decay") is None else "averaged"


def read_metrics(run: epath.Path) -> list[dict[str, Any]]:
    """The undamaged lines of RUN/metrics.jsonl; none if there is no such file.

    A warning counts the damaged lines, without a last line that is cut short: the run was killed while it wrote it.
    """
    path = run / METRICS_FILE
    texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [(text, _read_line(text)) for text in texts]
    damaged = sum(line is None and text.endswith(b"\n") for text, line in lines)
    if damaged:
        _LOGGER.warning("%d of the %d lines of '%s' are damaged, and were skipped.", damaged, len(lines), path)
    return [line for _, line in lines if line is not None]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line's step, and figures or lists of figures; None for a damaged line."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:  # not isinstance: True is an int
        return None
    values = [item for value in line.values() for item in (value if isinstance(value, list) else [value])]
    return line if all(type(value) in (int, float) for value in values) else None
