"""The results of a study's runs: how they are stored, and what is checked when they are read."""

import base64
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from castling_jax.errors import InputError, check, check_known, refusing
from experiments.study import RESULTS, STUDIES, Study, Trial, study_hash, trials_of

SPEED_FILE = RESULTS / "speed.json"  # inference times, which experiments.speed measures
SPEED_FIELDS = ("machine", "versions", "repeats", "rows")
ORIGIN_FILE = "origin.json"  # in RESULTS/STUDY: the commit, and the hashes of the code and of the study's file
ORIGIN_FIELDS = ("commit", "code", "study")
DATA_FIELDS = ("name", "train_split", "eval_split", "test_split")
# The first studies' results lack `mask`, `environment` and `contents`; only an arm that starts from another run has
# `start`.
FIELDS = (
    *("study", "data", "variant", "seed", "learning_rate", "accuracy_validation", "accuracy_train_form"),
    *("accuracy_inference_form", "correct", "images", "steps", "seconds", "parameters", "macs"),
    *("code", "commit", "command", "versions", "machine"),
)

Result = dict[str, Any]


def pack(correct: Bool[np.ndarray, "images"]) -> str:
    """One bit for each image, in base64: a result of 10,000 images stays under 2 kB."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(packed: str, images: int) -> Bool[np.ndarray, "images"]:
    """The inverse of `pack`.

    Raises:
      ValueError: it is not base64, or of another number of images.
    """
    answers = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8)
    if len(answers) != -(-images // 8):
        raise ValueError(f"it packs {8 * len(answers)} answers, not {images}")
    return np.unpackbits(answers, count=images).astype(bool)


def read_object(path: Path, fields: Collection[str]) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: the file cannot be read, holds something else, or lacks one of the fields.
    """
    with refusing((OSError, ValueError), f"'{path}' cannot be read: restore or remove it"):
        found = json.loads(path.read_text())
    missing = [field for field in fields if not (isinstance(found, dict) and field in found)]
    check(not missing, f"'{path}' has no {', '.join(missing)}: restore or remove it.")
    return found


def read_origin(name: str) -> dict[str, str] | None:
    """The commit and the hashes that a study's results come from; None before its first start.

    Raises:
      InputError: there are results without an origin, or the study's file has changed since its first start.
    """
    folder = RESULTS / name
    if not (folder / ORIGIN_FILE).exists():
        if any(folder.glob("*.json")):
            raise InputError(f"'{folder}' holds results without their {ORIGIN_FILE}: restore it, or remove them.")
        return None
    origin = read_object(folder / ORIGIN_FILE, ORIGIN_FIELDS)
    if origin["study"] != study_hash(name):
        raise InputError(
            f"{STUDIES / name}.py has changed since its first start: give the new study another name, or remove "
            f"'{folder}' and its folder in runs/experiments to run it anew."
        )
    return origin


def read_results(name: str, study: Study) -> list[Result]:
    """The results of a study's finished runs, in the order of its runs.

    Raises:
      InputError: a result is damaged, belongs to another study, data or code, or contradicts itself or the others.
    """
    origin = read_origin(name)
    paths = {trial.result: trial for trial in trials_of(name, study)}
    for path in (RESULTS / name).glob("*.json"):
        if path.name != ORIGIN_FILE:
            check_known(f"run of {name}", path.stem, [known.stem for known in paths])
    results: list[Result] = []
    costs: dict[str, dict[str, Any]] = {}  # arm -> what its first run cost
    contents: dict[str, Any] = {}  # what the first run recorded of the data, where runs do
    for path, trial in paths.items():
        if path.exists():
            assert origin is not None  # read_origin refuses results without one
            result = read_object(path, FIELDS)
            cost = _cost(result)
            expected = _expected(path, result, trial, study, origin) | costs.setdefault(trial.arm.name, cost)
            if "contents" in result:
                expected["contents"] = contents = contents or result["contents"]
            found = result | cost
            for field, value in expected.items():
                if found[field] != value:
                    raise InputError(f"'{path}' has {field} = {found[field]}, which should be {value}.")
            results.append(result)
    return results


def _cost(result: Result) -> dict[str, Any]:
    """What the runs of an arm share, whatever their seed."""
    schedule = [(evaluation["epoch"], evaluation["mask_threshold"]) for evaluation in result.get("mask", ())]
    return {field: result[field] for field in ("images", "steps", "parameters", "macs")} | {"schedule": schedule}


def _expected(path: Path, result: Result, trial: Trial, study: Study, origin: dict[str, str]) -> dict[str, Any]:
    """The fields that follow from others or from the study, so that a file that was edited by hand is found."""
    with refusing((TypeError, ValueError), f"'{path}' has no correct answers: restore or remove it"):
        correct = unpack(result["correct"], result["images"])
    # A split that the configuration leaves out is the data's own.
    named = {field: value for field, value in trial.config(study).dataset.items() if value is not None}
    expected = {
        **{"study": trial.study, "variant": trial.arm.name, "seed": trial.seed, "learning_rate": trial.learning_rate},
        "data": {field: named.get(field, result["data"].get(field)) for field in DATA_FIELDS},
        **{"code": origin["code"], "commit": origin["commit"], "accuracy_inference_form": correct.mean()},
    }
    if study.test_split is None:
        expected["accuracy_validation"] = expected["accuracy_inference_form"]
    return expected
