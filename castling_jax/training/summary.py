"""The summary of a finished run: WORKDIR/summary.json, and in Python a Summary."""

import dataclasses
import functools
import html
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from castling_jax.convert.inference_folder import load_inference
from castling_jax.convert.run_folder import (
    CONFIG_FILE,
    INFERENCE,
    METRICS_FILE,
    mask_kind,
    model_arguments,
    read_config,
)
from castling_jax.errors import InputError, printable
from castling_jax.models.macs import count_macs
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, count_parameters, features, get_variables
from castling_jax.sizes import image_shape
from castling_jax.storage import write_atomically
from castling_jax.tables import aligned
from castling_jax.tasks.registry import measures_of, task_in, task_of
from castling_jax.training.metrics import read_history
from castling_jax.training.timing import interleaved_seconds, medians, significant

SUMMARY_FILE = "summary.json"
TRAINING_FILE = "training.png"
REPEATS = 7  # timed calls of each form


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A finished run.

    Attributes:
      workdir: the run's folder.
      figures: the content of summary.json: the task's measures, steps, seconds, parameters, MACs, ...
    """

    workdir: epath.Path
    figures: dict[str, Any]

    @functools.cached_property
    def history(self) -> dict[str, np.ndarray]:
        """The logged figures over the steps: "step", "loss", ..., arrays of one length (`read_history`)."""
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
        measure = measures_of(self.figures)[0]
        reached = measure.text(self.figures[measure.best])
        return (
            f"Summary({self.figures['model']}, {reached} held out, {self.figures['steps']:,} steps, '{self.workdir}')"
        )

    def __str__(self) -> str:
        return describe(self.figures)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows: the table of both forms."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) + "</tr>"
            for row in _rows(self.figures)
        )
        return f"<p>{html.escape(_headline(self.figures))}</p><table>{rows}</table>"


def finish(workdir: epath.Path, figures: dict[str, Any]) -> Summary:
    """Draws the run, measures both forms, and writes WORKDIR/summary.json.

    Args:
      workdir: the folder of a run whose inference folder is written.
      figures: the figures of training and evaluation.
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
            "picture": str(save_picture(workdir)),
            "metrics": str(workdir / METRICS_FILE),
        },
    }
    path = workdir / SUMMARY_FILE
    # summary.json marks the run as finished, so it is written before the timing, which may fail or be interrupted.
    write_atomically(path, json.dumps(summary, indent=2).encode())
    try:
        summary["speed"] = measure_forms(spec.arguments())
    except jax.errors.JaxRuntimeError as error:
        print(f"The speed of the two forms could not be measured: {str(error).splitlines()[0]}", file=sys.stderr)
    write_atomically(path, json.dumps(summary, indent=2).encode())
    return Summary(workdir, summary)


def save_picture(workdir: epath.Path) -> epath.Path:
    """Draws WORKDIR/training.png from the metrics; config.json tells the task and the mask kind.

    Without config.json, it is drawn as a classifier's with a threshold.

    Raises:
      InputError: there are no metrics in workdir, or config.json is damaged.
    """
    from castling_jax.plots import draw_training, png  # here, because matplotlib takes half a second to import

    history = read_history(workdir)
    if not len(history["step"]):
        raise InputError(f"'{workdir}' has no metrics to draw: {METRICS_FILE} is missing or empty.")
    path = workdir / TRAINING_FILE
    task, kind = task_in({}), "threshold"
    if (workdir / CONFIG_FILE).exists():
        config = read_config(workdir)
        task, kind = task_of(abstract_model(**model_arguments(config))), mask_kind(config)
    measure = task.measures[0]
    figure = draw_training(
        history,
        mask_kind=kind,
        measure=measure.name,
        title=measure.title[0].upper() + measure.title[1:],
        is_share=measure.is_share,
        loss=task.loss_title,
    )
    write_atomically(path, png(figure))
    return path


def measure_forms(arguments: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of both forms' forward passes on one image, measured in turns.

    python -m castling_jax.tools.benchmark --models --image-sizes=SIZES measures longer sequences.

    Args:
      arguments: arguments of `create_model`, with image_size and dtype.
    """
    # NumPy draws the numbers: compiling a model's own initialisation takes longer than all the rest. They are positive,
    # because some of them are variances.
    rng, image_size = np.random.default_rng(0), arguments["image_size"]
    images = jnp.asarray(rng.uniform(size=(1, *image_shape(image_size), 3)), jnp.float32)
    calls: dict[str, Callable[[], object]] = {}
    for form in ("train", "inference"):
        model = abstract_model(**arguments | {"form": form})
        variables = jax.tree.map(
            lambda leaf: jnp.asarray(rng.uniform(0, 0.02, leaf.shape), leaf.dtype), get_variables(model)
        )
        # A traced threshold, so that the training form runs its branch as it does in training.
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
    """The summary of a finished run; None if the run is not finished.

    Raises:
      InputError: the summary is damaged.
    """
    path = workdir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        describe(summary)  # reads every figure that a summary must have, so a missing one is found here
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error!r}): remove it, and main.py writes it anew.") from error
    return Summary(workdir, summary)


def describe(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    files = [(name, printable(path)) for name, path in summary["files"].items()]
    return "\n".join(
        [
            _headline(summary),
            *aligned(_rows(summary), widths=(28, 14, 16)),
            f"  largest difference between the two forms' outputs: {summary['max_difference']:.1e}",
            *aligned(files, "l", widths=(26,)),
        ]
    )


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of both forms: rows of (name, training form's figure, inference form's figure)."""
    speed = summary["speed"]
    rows = [
        ("", "training form", "inference form"),
        *((measure.title, *measure.texts(summary)) for measure in measures_of(summary)),
        *describe_each_weights(summary),
        ("parameters", *(f"{summary[f'parameters_{form}_form']:,}" for form in ("train", "inference"))),
        ("MACs an image", *(f"{summary[f'macs_{form}_form'] / 1e6:,.2f} M" for form in ("train", "inference"))),
    ]
    if speed is not None:
        times = (f"{significant(speed[f'{form}_form_ms'])} ms" for form in ("train", "inference"))
        rows.append((f"time an image, {speed['tokens']:,} tokens", *times))
    return rows


def _headline(summary: dict[str, Any]) -> str:
    """One line: the model, how long it was trained, and the data that it was evaluated on."""
    skipped = f" ({summary['skipped_steps']:,} skipped)" if summary.get("skipped_steps") else ""
    data = ""
    if "dataset" in summary:  # earlier versions' summaries lack it
        data = f", on {summary['eval_images']:,} images of {summary['dataset']} {summary['split']}"
    return (
        f"{summary['model']}: {summary['steps']:,} steps{skipped} in {summary['train_seconds']:.0f} s, "
        f"mask {_mask_kind(summary)} {summary['mask_threshold']:g} at the end{data}"
    )


def _mask_kind(figures: Mapping[str, Any]) -> str:
    """The run's mask kind; earlier versions' figures lack it, and belong to runs with a threshold."""
    return figures.get("mask_kind", "threshold")


def describe_measures(figures: Mapping[str, Any]) -> list[str]:
    """[training form's measures, inference form's measures], each a string: "98.06 % top-1, 100.00 % top-5"."""
    texts = [[f"{text} {measure.short}" for text in measure.texts(figures)] for measure in measures_of(figures)]
    return [", ".join(form) for form in zip(*texts, strict=True)]


def describe_each_weights(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows for the raw and the averaged weights, which mark the exported ones; none if there are only raw weights."""
    measure = measures_of(figures)[0]
    return [
        (
            f"  {kind} weights" + (", exported" if kind == figures["exported"] else ""),
            *measure.texts(figures, f"{kind}_"),
        )
        for kind in ("raw", "averaged")
        if measure.is_in(figures, f"{kind}_")
    ]
