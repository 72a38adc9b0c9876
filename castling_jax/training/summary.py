"""What came of a run: WORKDIR/summary.json, and in Python a Summary."""

import dataclasses
import functools
import html
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from castling_jax.convert.inference_folder import load_inference
from castling_jax.convert.run_folder import INFERENCE, METRICS_FILE
from castling_jax.errors import InputError, printable
from castling_jax.models.macs import count_macs
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, count_parameters, features, get_variables
from castling_jax.plots import draw_training, png
from castling_jax.storage import write_atomically
from castling_jax.training.metrics import read_history
from castling_jax.training.timing import interleaved_seconds, medians, significant

SUMMARY_FILE = "summary.json"
TRAINING_FILE = "training.png"
REPEATS = 7


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A finished run.

    Attributes:
      workdir: its folder.
      figures: what summary.json holds: accuracies, steps, seconds, parameters, MACs, ...
    """

    workdir: epath.Path
    figures: dict[str, Any]

    @functools.cached_property
    def history(self) -> dict[str, np.ndarray]:
        """The metrics over the steps: "step", "loss", ..., arrays of one length (`read_history`)."""
        return read_history(self.workdir)

    @property
    def model(self) -> Model:
        """The model in inference form."""
        return self._inference[0]

    @property
    def variables(self) -> Variables:
        """The trained variables of the inference form."""
        return self._inference[1]

    @functools.cached_property
    def _inference(self) -> tuple[Model, Variables]:
        return load_inference(self.workdir / INFERENCE)

    def __repr__(self) -> str:
        accuracy = f"{100 * self.figures['accuracy_inference_form']:.2f} %"
        return (
            f"Summary({self.figures['model']}, {accuracy} held out, {self.figures['steps']:,} steps, '{self.workdir}')"
        )

    def __str__(self) -> str:
        return describe(self.figures)

    def _repr_html_(self) -> str:
        """What a notebook shows: the table of both forms."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) + "</tr>"
            for row in _rows(self.figures)
        )
        return f"<p>{html.escape(_headline(self.figures))}</p><table>{rows}</table>"


def finish(workdir: epath.Path, figures: dict[str, Any]) -> Summary:
    """Draws the run, measures both forms, and writes WORKDIR/summary.json.

    Args:
      workdir: a run that has its inference folder.
      figures: what training returned.
    """
    inference_model, inference_variables = load_inference(workdir / INFERENCE)
    spec = inference_model.spec
    train_model = abstract_model(**spec.arguments(form="train"))
    summary = {
        **figures,
        "parameters_train_form": count_parameters(get_variables(train_model)),
        "parameters_inference_form": count_parameters(inference_variables),
        "macs_train_form": count_macs(train_model),
        "macs_inference_form": count_macs(inference_model),
        "speed": None,
        "files": {
            "checkpoints": str(workdir / "checkpoints"),
            "inference": str(workdir / INFERENCE),
            "picture": str(save_picture(workdir, _mask_kind(figures))),
            "metrics": str(workdir / METRICS_FILE),
        },
    }
    path = workdir / SUMMARY_FILE
    write_atomically(path, json.dumps(summary, indent=2).encode())  # the run is finished, whatever becomes of the rest
    try:
        summary["speed"] = measure_forms(spec.arguments())
    except jax.errors.JaxRuntimeError as error:
        print(f"The speed of the two forms could not be measured: {str(error).splitlines()[0]}", file=sys.stderr)
    write_atomically(path, json.dumps(summary, indent=2).encode())
    return Summary(workdir, summary)


def save_picture(workdir: epath.Path, mask_kind: str = "threshold") -> epath.Path:
    """Draws WORKDIR/training.png from the metrics; `mask_kind` as `draw_training` takes it.

    Raises:
      InputError: there are no metrics in workdir.
    """
    history = read_history(workdir)
    if not len(history["step"]):
        raise InputError(f"'{workdir}' has no metrics to draw: {METRICS_FILE} is missing or empty.")
    path = workdir / TRAINING_FILE
    write_atomically(path, png(draw_training(history, mask_kind=mask_kind)))
    return path


def measure_forms(arguments: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of both forms' forward passes on one image, measured in turns.

    Longer sequences are for python -m castling_jax.tools.benchmark --models --image-sizes=SIZES.

    Args:
      arguments: of `create_model`, with the image size and the compute dtype.
    """
    # Made by numpy: compiling what draws a model's own first weights takes longer than all the rest. All numbers are
    # positive, which variances have to be.
    rng, image_size = np.random.default_rng(0), arguments["image_size"]
    images = jnp.asarray(rng.uniform(size=(1, image_size, image_size, 3)), jnp.float32)
    calls: dict[str, Callable[[], object]] = {}
    for form in ("train", "inference"):
        model = abstract_model(**arguments | {"form": form})
        variables = jax.tree.map(
            lambda leaf: jnp.asarray(rng.uniform(0, 0.02, leaf.shape), leaf.dtype), get_variables(model)
        )
        calls[form] = functools.partial(
            jax.jit(functools.partial(apply, model)), variables, images, mask_threshold=jnp.float32(0.02)
        )
    first_stage = jax.eval_shape(functools.partial(features, model), variables, images)[0]
    tokens = getattr(model, "prefix_tokens", 0) + first_stage.shape[1] * first_stage.shape[2]
    times = medians(interleaved_seconds(calls, repeats=REPEATS))
    return {
        "image_size": image_size,
        "tokens": tokens,
        "train_form_ms": 1e3 * times["train"],
        "inference_form_ms": 1e3 * times["inference"],
    }


def read_summary(workdir: epath.Path) -> Summary | None:
    """The summary of a finished run; None where the run is not finished.

    Raises:
      InputError: it is damaged.
    """
    path = workdir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        describe(summary)  # which takes what a summary has to have
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error!r}): remove it, and main.py makes it anew.") from error
    return Summary(workdir, summary)


def describe(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    table = "\n".join(f"  {name:28s}{left:>16s}{right:>18s}" for name, left, right in _rows(summary))
    return (
        f"{_headline(summary)}\n{table}\n"
        f"  largest difference between the two forms' logits: {summary['max_difference']:.1e}\n"
        + "\n".join(f"  {name:28s}{printable(path)}" for name, path in summary["files"].items())
    )


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of both forms: a name, the training form's figure, the inference form's."""
    speed = summary["speed"]
    rows = [
        ("", "training form", "inference form"),
        ("held-out accuracy", *_accuracies(summary)),
        *([("  top 5", *_accuracies(summary, "top5_"))] if "top5_accuracy_train_form" in summary else []),
        *describe_each_weights(summary),
        ("parameters", *(f"{summary[f'parameters_{form}_form']:,}" for form in ("train", "inference"))),
        ("MACs an image", *(f"{summary[f'macs_{form}_form'] / 1e6:,.2f} M" for form in ("train", "inference"))),
    ]
    if speed is not None:
        times = (f"{significant(speed[f'{form}_form_ms'])} ms" for form in ("train", "inference"))
        rows.append((f"time an image, {speed['tokens']:,} tokens", *times))
    return rows


def _headline(summary: dict[str, Any]) -> str:
    """What was trained, for how long, and on what it was evaluated."""
    skipped = f" ({summary['skipped_steps']:,} skipped)" if summary.get("skipped_steps") else ""
    data = ""
    if "dataset" in summary:  # which an earlier version's does not have
        data = f", on {summary['eval_images']:,} images of {summary['dataset']} {summary['split']}"
    return (
        f"{summary['model']}: {summary['steps']:,} steps{skipped} in {summary['train_seconds']:.0f} s, "
        f"mask {_mask_kind(summary)} {summary['mask_threshold']:g} at the end{data}"
    )


def _mask_kind(figures: dict[str, Any]) -> str:
    """An earlier version's figures, which do not say it, are of a threshold."""
    return figures.get("mask_kind", "threshold")


def _accuracies(figures: dict[str, Any], kind: str = "") -> list[str]:
    """Of the training form and of the inference form."""
    return [f"{100 * figures[f'{kind}accuracy_{form}_form']:.2f} %" for form in ("train", "inference")]


def describe_accuracies(figures: dict[str, Any]) -> list[str]:
    """Top-1 and, where there is one, top-5 accuracy of the training form and of the inference form."""
    top5 = _accuracies(figures, "top5_") if "top5_accuracy_train_form" in figures else None
    return [
        f"{accuracy} top-1" + ("" if top5 is None else f", {top5[form]} top-5")
        for form, accuracy in enumerate(_accuracies(figures))
    ]


def describe_each_weights(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the raw and the averaged weights, which say which are exported; none where there are only raw ones."""
    return [
        (f"  {kind} weights" + (", exported" if kind == figures["exported"] else ""), *_accuracies(figures, f"{kind}_"))
        for kind in ("raw", "averaged")
        if f"{kind}_accuracy_train_form" in figures
    ]
