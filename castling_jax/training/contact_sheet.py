"""A contact sheet: what a configuration does to its images, one by one and mixed."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import model_arguments, preprocessing_of
from castling_jax.data.mixing import mix
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import EvalTransform, denormalize_images, train_transform
from castling_jax.models.registry import abstract_model
from castling_jax.plots import SMALL, png
from castling_jax.preprocessing import Preprocessing
from castling_jax.storage import write_atomically
from castling_jax.training.config import default_config, mixing_options
from castling_jax.training.setup import named_splits

COLUMNS = 8  # of a contact sheet; even, so that no image is its own partner
MIXED_ROWS = 3


def draw_augmentations(config: ConfigDict, path: epath.Path, *, examples: int) -> epath.Path:
    """Writes the contact sheet of a configuration to a PNG file, whose folder is made, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(draw_sheet(config, examples=examples)))
    return path


def draw_sheet(config: ConfigDict, *, examples: int) -> Figure:
    """The contact sheet of a configuration.

    Args:
      config: as `default_config` gives it.
      examples: rows of single images.

    Raises:
      InputError: there is no such data set, or its images do not fit the configuration.
    """
    train_split, _ = named_splits(config.dataset)
    dataset = load_dataset(config.dataset.name, train_split, data_dir=config.dataset.data_dir)
    size = abstract_model(**model_arguments(config)).spec.image_size
    preprocessing = preprocessing_of(config, size)
    evaluation, training = EvalTransform(preprocessing), train_transform(config.augment, preprocessing)
    chosen = [dataset[int(index)] for index in np.linspace(0, len(dataset) - 1, max(examples, COLUMNS))]
    drawn = [
        [training(example, np.random.default_rng((config.seed, row, column))) for column in range(1, COLUMNS)]
        for row, example in enumerate(chosen)
    ]

    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    rows = examples + (MIXED_ROWS if mixes else 0)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.75 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for row, (example, draws) in enumerate(zip(chosen[:examples], drawn, strict=False)):
        for axis, shown in zip(axes[row], [evaluation(example), *draws], strict=True):
            _show(axis, shown["image"], preprocessing)
        axes[row, 0].set_ylabel(f"class {example['label']}", fontsize=SMALL)
    axes[0, 0].set_title("evaluation", fontsize="medium")
    axes[0, 1].set_title("training", fontsize="medium", loc="left")
    if mixes:
        batch = [draws[0] for draws in drawn[:COLUMNS]]
        for row, (images, targets) in zip(axes[examples:], _mixed(config, batch, dataset.num_classes), strict=True):
            for axis, image, target in zip(row, np.asarray(images), np.asarray(targets), strict=True):
                _show(axis, image, preprocessing)
                axis.set_xlabel(_describe_target(target), fontsize=SMALL)
            row[0].set_ylabel("mixed batch", fontsize=SMALL)

    changed = [f"{name} {value}" for name, value in config.augment.items() if value != default_config().augment[name]]
    figure.suptitle(f"{config.dataset.name} at {size} x {size}: {', '.join(changed) or 'no augmentation'}", wrap=True)
    return figure


def _mixed(config: ConfigDict, batch: list[dict[str, Any]], num_classes: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """A batch's images and targets, mixed anew each time."""
    mixed = jax.jit(
        functools.partial(
            mix,
            jnp.stack([example["image"] for example in batch]),
            jnp.array([example["label"] for example in batch]),
            **mixing_options(config),
            num_classes=num_classes,
            label_smoothing=config.loss.label_smoothing,
        )
    )
    for key in jax.random.split(jax.random.key(config.seed), MIXED_ROWS):
        yield mixed(key)


def _show(axis: Any, image: np.ndarray, preprocessing: Preprocessing) -> None:
    axis.imshow(denormalize_images(image, preprocessing))
    axis.set(xticks=[], yticks=[])


def _describe_target(target: np.ndarray) -> str:
    """The two heaviest classes: what label smoothing gives to all of them is not said of each."""
    heaviest = [label for label in np.argsort(-target)[:2] if target[label] > target.min()]
    return ", ".join(f"{label}: {target[label]:.2f}" for label in heaviest)
