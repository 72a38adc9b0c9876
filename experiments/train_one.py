"""Trains and tests one run of a study: python -m experiments.train_one STUDY RUN --workdir=DIR --result=FILE.

`experiments.run` starts it in a separate process. A run that was killed resumes; FILE is written at its end.
"""

import argparse
import fcntl
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import read_config, read_metrics
from castling_jax.errors import InputError, check_known
from castling_jax.storage import write_atomically
from castling_jax.tasks.classification.answers import ANSWERS_FILE
from castling_jax.tools.cli import ending_in_a_sentence, local_path
from castling_jax.training.evaluate_run import EVALUATIONS
from castling_jax.training.malloc import keep_freed_memory_on_cpu
from castling_jax.training.preemption import Preempted
from castling_jax.training.run import DATA_FILE, run
from castling_jax.training.summary import Summary
from experiments.mask import evaluations_of
from experiments.results import ORIGIN_FIELDS, ORIGIN_FILE, pack, read_object
from experiments.study import Study, Trial, code_hash, load_study, trials_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
VARIABLES = ("JAX_", "XLA_", "OMP_", "GLIBC_")  # what these variables choose changes roundings, or the time
PARTS = ("training", "held-out", "test")  # of the data, as a run records them


def train_one(trial: Trial, workdir: Path, commit: str) -> dict[str, Any]:
    """Trains or resumes a run, and tests it.

    Args:
      trial: the run.
      workdir: its folder.
      commit: the commit that the code is from.

    Returns:
      The run's result; README.md describes its fields.

    Raises:
      InputError: the library refuses the configuration, or an image of the test split is corrupt.
    """
    study = load_study(trial.study)
    start = None if trial.arm.start is None else _train_start(trial, study, workdir.parent)
    summary = _train(trial.config(study, None if start is None else Path(start.workdir)), workdir)
    correct = _correct_answers(summary)
    figures, data = summary.figures, read_config(summary.workdir)["dataset"]
    recorded = read_object(Path(summary.workdir, DATA_FILE), PARTS)
    return {
        "study": trial.study,
        "data": {field: data[field] for field in ("name", "train_split", "eval_split", "test_split")},
        "contents": {part: recorded[part] for part in PARTS},
        "variant": trial.arm.name,
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        "accuracy_validation": figures["validation"]["accuracy_inference_form"],
        "accuracy_train_form": figures["accuracy_train_form"],
        "accuracy_inference_form": figures["accuracy_inference_form"],
        "correct": pack(correct),
        "images": len(correct),
        "mask": evaluations_of(read_metrics(summary.workdir)),
        "steps": figures["steps"],
        "seconds": figures["train_seconds"],
        **({} if start is None else {"start": trial.arm.start, "start_seconds": start.figures["train_seconds"]}),
        "parameters": figures["parameters_inference_form"],
        "macs": figures["macs_inference_form"],
        "code": code_hash(trial.study),
        "commit": commit,
        "command": f"python -m experiments.run {trial.study} --only={trial.name}",
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {_processor()}, {jax.devices()[0].device_kind}",
    }


def _train_start(trial: Trial, study: Study, runs: Path) -> Summary:
    """The finished run that the trial starts from; trains or resumes it if need be."""
    name, config = trial.start_of(study)
    return _train(config, runs / name)


def _train(config: ConfigDict, workdir: Path) -> Summary:
    """The finished run; trains or resumes it if need be."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may need the same run at once: the second one waits, and finds it finished.
    with (workdir.parent / f"{workdir.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run(config, workdir)


def _correct_answers(summary: Summary) -> Bool[np.ndarray, "images"]:
    """Which images of the test split the exported inference form classifies correctly, in the split's order."""
    figures = summary.figures
    if figures["eval_corrupt"]:
        raise InputError(f"{figures['eval_corrupt']:,} images of the test split are corrupt.")
    (path,) = (summary.workdir / EVALUATIONS).glob(f"*-{figures['steps']}/{ANSWERS_FILE}")
    answers = np.genfromtxt(path, delimiter=",", names=True, dtype=int)
    return answers["inference_form"] == answers["label"]


def _processor() -> str:
    """The processor's name, which only Linux states in full."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("run")
    parser.add_argument("--workdir", type=local_path, required=True)
    parser.add_argument("--result", type=local_path, required=True)
    options = parser.parse_args()
    keep_freed_memory_on_cpu()
    try:
        trials = {trial.name: trial for trial in trials_of(options.study, load_study(options.study))}
        check_known(f"run of {options.study}", options.run, trials)
        # The runner has recorded the commit: a copy of a checkout has no git to ask.
        commit = read_object(options.result.parent / ORIGIN_FILE, ORIGIN_FIELDS)["commit"]
        result = train_one(trials[options.run], options.workdir, commit)
    except Preempted as preempted:
        sys.exit(f"interrupted; the state of step {preempted.step} is saved.")
    write_atomically(options.result, json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
