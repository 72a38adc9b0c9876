"""The files in a run's folder that say what its checkpoints are: config.json and the log, metrics.jsonl."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from castling_jax.errors import InputError, about, refusing
from castling_jax.preprocessing import Preprocessing
from castling_jax.storage import write_atomically

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
INFERENCE = "inference"  # a run's inference folder
START_THRESHOLDS = {"threshold": 0.02, "fade": 0.0}  # by mask.kind; 0.02 is that of the authors' block
FORMAT = 1  # of config.json. A file that does not state one is of format 1 too
_LOGGER = logging.getLogger(__name__)


def write_config(run: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes RUN/config.json: the format, and the configuration's fields as nested objects."""
    write_atomically(run / CONFIG_FILE, json.dumps({"format": FORMAT, **config}, indent=2).encode())


def read_config(run: epath.Path) -> dict[str, Any]:
    """The fields of RUN/config.json, nested; an earlier version's may lack some, and may have others.

    Raises:
      InputError: it is missing, damaged, of another format, or does not say what the run's model is.
    """
    path = run / CONFIG_FILE
    damage = (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError)
    with refusing(damage, f"'{path}' is missing or damaged"):
        config = json.loads(path.read_text())
        written_as = config.pop("format", FORMAT)
        if written_as == FORMAT:  # all that a reader of the run goes by is there, and of the right type
            model_arguments(config), exported_weights(config), start_threshold(config["mask"])
            config["dataset"].keys()
    if written_as != FORMAT:
        raise InputError(f"'{path}' is of format {written_as}; this version reads format {FORMAT}.")
    with about(f"'{path}' is damaged"):
        preprocessing_of(config, image_size=1)
    return config


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create_model` that a configuration, or a run's config.json, gives."""
    arguments = {name: value for name, value in config["model"].items() if value is not None}
    if arguments.get("token_conv") == "none":
        arguments["token_conv"] = None
    if mask_kind(config) != "threshold":
        arguments["mask_kind"] = mask_kind(config)
    return arguments


def mask_kind(config: Mapping[str, Any]) -> str:
    """How a run empties the softmax branch; a run of an earlier version always by a threshold."""
    return config["mask"].get("kind", "threshold")


def start_threshold(mask: Mapping[str, Any]) -> float:
    """The mask's threshold at the start: of the configuration's group `mask`, where None is its kind's own."""
    start = mask["start_threshold"]
    return START_THRESHOLDS[mask.get("kind", "threshold")] if start is None else float(start)


def preprocessing_of(config: Mapping[str, Any], image_size: Any) -> Preprocessing:
    """What a run does to the images that it is evaluated on, by its configuration or its config.json.

    An earlier version's config.json may lack fields, which then have `Preprocessing`'s defaults.
    """
    data = config["dataset"]
    names = ("mean", "std", "crop_ratio", "exif")
    return Preprocessing(image_size, **{name: data[name] for name in names if name in data})


def exported_weights(config: Mapping[str, Any]) -> str:
    """The weights that a run exports and chooses the best checkpoint by: "raw" or "averaged"."""
    train = config["train"]
    if train.get("export") is not None:  # which an earlier version's does not have
        return train["export"]
    return "raw" if train.get("ema_decay") is None else "averaged"


def read_metrics(run: epath.Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl that are whole; none where there is no such file.

    Damaged ones are counted in a warning, but for a last one that is cut short: the run was killed while writing it.
    """
    path = run / METRICS_FILE
    texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [(text, _read_line(text)) for text in texts]
    damaged = sum(line is None and text.endswith(b"\n") for text, line in lines)
    if damaged:
        _LOGGER.warning("%d of the %d lines of '%s' are damaged, and were skipped.", damaged, len(lines), path)
    return [line for _, line in lines if line is not None]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """What a line says: a step, and figures or lists of them; None where it is damaged."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    values = [item for value in line.values() for item in (value if isinstance(value, list) else [value])]
    return line if all(type(value) in (int, float) for value in values) else None
