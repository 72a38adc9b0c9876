"""What a run prints for its user: a description before the first step, then its progress.

Process 0 alone prints, to standard error. A terminal shows a bar of steps, a notebook its own kind of bar, and a log
plain lines.
"""

import contextlib
import datetime
import math
import sys
import warnings
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import TqdmWarning
from tqdm import tqdm as plain_tqdm

from castling_jax.data.annotations import BoxDataset
from castling_jax.data.decode import image_size
from castling_jax.data.folder import list_skipped
from castling_jax.errors import InputError, printable
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.variables import count_parameters, get_variables
from castling_jax.sizes import size_text
from castling_jax.training.setup import Setup

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # says that a notebook has no ipywidgets: then it gets plain lines
    from tqdm.auto import tqdm

IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)  # tqdm.auto found one that shows bars


class Console:
    """Prints one run's description and progress.

    Args:
      setup: the run's parts.
      first_step: number of steps that an earlier part of the run has made.
      speaks: whether this process prints at all. It prints progress only with config.logging.progress.
    """

    def __init__(self, setup: Setup, first_step: int, *, speaks: bool):
        self._setup, self._speaks = setup, speaks
        self._shows_progress = speaks and setup.config.logging.progress
        shows_bar = self._shows_progress and (sys.stderr.isatty() or IN_NOTEBOOK)
        self._bar = tqdm(total=setup.total_steps, initial=first_step, unit="step", disable=not shows_bar)

    def begin(self, workdir: epath.Path) -> None:
        """Describes the run, before its first step."""
        if self._shows_progress:
            self.say(describe_start(self._setup, workdir))

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._speaks:
            plain_tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """Counts one more step that was sent to the devices."""
        self._bar.update()

    def logged(self, step: int, line: dict[str, Any]) -> None:
        """Prints the figures of a step; a skipped step has no loss."""
        loss, speed = line.get("loss", math.nan), rate_text(line["images_per_second"])
        self._bar.set_postfix({"loss": f"{loss:.3f}", "images/s": speed})
        if self._shows_progress and self._bar.disable:
            total, left = self._setup.total_steps, datetime.timedelta(seconds=round(line["eta_seconds"]))
            self.say(f"step {step:,} of {total:,}: loss {loss:.4f}, {speed} images/s, {left} left")

    def evaluated(self, step: int, loss: float, density: Any, figures: dict[str, Any], threshold: float) -> None:
        """Prints the figures of an evaluation, with the loss and the mask density of the step before it."""
        if not self._shows_progress:
            return
        epoch = f"epoch {step / self._setup.steps_per_epoch:g}, step {step:,}"
        measure = self._setup.task.measures[0]
        train_text, text = measure.texts(figures)
        # Without a switch, both forms are the same model: one figure says it all.
        if KINDS[self._setup.model.spec.attention].inference is not None:
            text = f"{train_text} in training form, {text} in inference form"
            text += f"; mask {self._setup.config.mask.kind} {threshold:.3g}, density {np.mean(density):.3g}"
        held_out = f", held out {figures['eval_loss']:.4f}" if "eval_loss" in figures else ""
        self.say(f"{epoch}: loss {loss:.4f}{held_out}; {measure.name} held out {text}")

    def close(self) -> None:
        """Closes the bar, which stays visible as it is."""
        self._bar.close()


def describe_images(setup: Setup) -> dict[str, str]:
    """Lines about the images: the size of the first one, if it is a file, and the files that were skipped."""
    lines = {}
    with contextlib.suppress(InputError):  # the first image may be corrupt; training counts it
        if isinstance(image := setup.train_set[0]["image"], bytes):
            height, width = image_size(image, exif=setup.config.dataset.exif)
            seen = " x ".join(map(str, reversed(setup.preprocessing.shape)))
            lines["images"] = f"the first has {width} x {height} pixels, and the model sees {seen}"
    if skipped := list_skipped((setup.train_set, setup.eval_set, setup.test_set)):
        lines["skipped"] = f"files that are no images, by their names: {skipped}"
    if isinstance(setup.train_set, BoxDataset):
        lines["boxes"] = describe_boxes(setup.train_set, setup.config.augment.max_boxes)
    return lines


def rate_text(rate: float) -> str:
    """A rate with at least two significant digits: a large model on a CPU may need seconds for an image."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def describe_boxes(dataset: BoxDataset, most: int) -> str:
    """A line on the boxes to learn from: how many there are, and how many of them training does not take."""
    crowd = dataset.columns["crowd"]
    counts = np.diff(np.concatenate([[0], np.cumsum(~crowd)])[dataset.starts])
    said = f"{counts.sum():,} to learn from, at most {counts.max():,} in an image"
    if crowd.any():
        said += f"; {crowd.sum():,} that are crowds or difficult objects are passed over"
    if dataset.dropped:
        said += f"; {dataset.dropped:,} that have no area in their image are left out"
    if beyond := np.maximum(counts - most, 0).sum():
        said += f"; {beyond:,} are beyond the {most:,} of an image that training takes"
    return said


def of_classes(count: int) -> str:
    """ " of 10 classes", after a number of images; "" if they have none."""
    return f" of {count:,} class" + "es" * (count > 1) if count else ""


def describe_start(setup: Setup, workdir: epath.Path) -> str:
    """The block of lines before the first step: data, model, steps, devices, folder, and a last line on compiling."""
    config, spec = setup.config, setup.model.spec
    data, train = config.dataset, config.train
    splits = [(setup.train_set, data.train_split), (setup.eval_set, data.eval_split), (setup.test_set, data.test_split)]
    counts = ", ".join(f"{split} {len(dataset):,}" for dataset, split in splits if dataset is not None)
    costs = f"{count_parameters(get_variables(setup.model)):,} parameters, {setup.macs[1] / 1e6:,.1f} M MACs an image"
    if setup.macs[0] != setup.macs[1]:
        costs += f" ({setup.macs[0] / 1e6:,.1f} M in training form)"
    axes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items() if size > 1) or "one device"
    kinds = " and ".join(sorted({device.device_kind for device in setup.mesh.devices.flat}))
    processes = f"{jax.process_count()} process" + "es" * (jax.process_count() > 1)
    lines = {
        "data": f"{data.name}: {counts} images{of_classes(setup.train_set.num_classes)}",
        **describe_images(setup),
        "model": f"{spec.name}, {spec.attention}, {size_text(spec.image_size)}: {costs}",
        "steps": f"{setup.total_steps:,} of {train.batch_size:,} images, {setup.steps_per_epoch:,} an epoch: "
        f"{train.epochs:,} epochs",
        "devices": f"{setup.mesh.devices.size} x {kinds}, {processes}; mesh: {axes}",
        "folder": str(workdir),
    }
    block = [f"{name:8s}{printable(text)}" for name, text in lines.items()]
    return "\n".join([*block, "compiling the first step"])
