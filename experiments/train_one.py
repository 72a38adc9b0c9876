"""Trains and tests one run of a study: python -m experiments.train_one STUDY RUN --workdir=DIR --result=FILE.

`experiments.run` starts it in a process of its own. A run that was killed goes on; FILE is written at its end.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from castling_jax.convert.weights import read
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import eval_transform
from castling_jax.errors import InputError, check_known
from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import Variables, apply
from castling_jax.storage import write_atomically
from castling_jax.tools.memory import keep_freed_memory
from castling_jax.training.config import image_options
from castling_jax.training.preemption import Preempted
from castling_jax.training.run import run
from castling_jax.training.summary import Summary
from experiments.results import pack
from experiments.study import ROOT, Trial, code_hash, load_study, trials_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def train_one(trial: Trial, workdir: Path) -> dict[str, Any]:
    """Trains a run, or what is left of it, and tests it.

    Returns:
      The run's result, as README.md describes it.

    Raises:
      InputError: the library refuses the configuration, or an image of the test split is corrupt.
    """
    study = load_study(trial.study)
    config = trial.config(study)
    summary = run(config, workdir)
    train_form, inference_form = correct_answers(summary, config, study.test_split)
    figures, data = summary.figures, config.dataset
    return {
        "study": trial.study,
        "data": {
            "name": data.name,
            "train_split": data.train_split,
            "eval_split": data.eval_split,
            "test_split": study.test_split,
        },
        "variant": trial.arm.name,
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        "accuracy_validation": figures["accuracy_inference_form"],
        "accuracy_train_form": float(train_form.mean()),
        "accuracy_inference_form": float(inference_form.mean()),
        "correct": pack(inference_form),
        "images": len(inference_form),
        "steps": figures["steps"],
        "seconds": figures["train_seconds"],
        "parameters": figures["parameters_inference_form"],
        "macs": figures["macs_inference_form"],
        "code": code_hash(trial.study),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "command": f"python -m experiments.run {trial.study} --only={trial.name}",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {_processor()}, {jax.devices()[0].device_kind}",
    }


def correct_answers(
    summary: Summary, config: ConfigDict, split: str
) -> tuple[Bool[np.ndarray, "images"], Bool[np.ndarray, "images"]]:
    """Which images of a split a finished run classifies correctly, in the split's order.

    Returns:
      The training form's answers, at the last step's mask threshold, and those of the exported inference form.

    Raises:
      InputError: an image is corrupt.
    """
    checkpoint = read(summary.workdir)
    assert checkpoint.model is not None  # a run's checkpoint says what its model is
    train_form = functools.partial(_classify, checkpoint.model, mask_threshold=checkpoint.mask_threshold)
    forms = (
        (jax.jit(train_form), jax.device_put(checkpoint.variables)),
        (jax.jit(functools.partial(_classify, summary.model)), jax.device_put(summary.variables)),
    )
    batches = evaluation_batches(
        load_dataset(config.dataset.name, split, data_dir=config.dataset.data_dir),
        batch_size=config.evaluation.batch_size,
        transform=eval_transform(**image_options(config, summary.model.spec.image_size)),
    )
    answers = []
    for batch in batches:
        is_image = batch["weight"] > 0  # the last batch is padded
        labels = batch["label"][is_image]
        answers.append([np.asarray(form(variables, batch["image"]))[is_image] == labels for form, variables in forms])
    of_train_form, of_inference_form = zip(*answers, strict=True)
    return np.concatenate(of_train_form), np.concatenate(of_inference_form)


def _classify(model: Backbone, variables: Variables, images: jax.Array, **inputs: Any) -> jax.Array:
    return apply(model, variables, images, **inputs).argmax(-1)


def _processor() -> str:
    """The processor's name; Linux alone tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("run")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    try:
        trials = {trial.name: trial for trial in trials_of(options.study, load_study(options.study))}
        check_known(f"run of {options.study}", options.run, trials)
        result = train_one(trials[options.run], options.workdir)
    except InputError as error:
        sys.exit(str(error))
    except Preempted as preempted:
        sys.exit(f"interrupted; the state of step {preempted.step} is saved.")
    write_atomically(options.result, json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
