"""A contact sheet: what a configuration does to its images, one by one and mixed."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import model_arguments, preprocessing_of
from castling_jax.data.mixing import mix
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import EvalTransform, train_transform
from castling_jax.models.registry import abstract_model
from castling_jax.training.config import default_config, mixing_options
from castling_jax.training.setup import named_splits

COLUMNS = 8  # of a contact sheet; even, so that no image is its own partner
MIXED_ROWS = 3


def draw_augmentations(config: ConfigDict, path: epath.Path, *, examples: int) -> epath.Path:
    """Draws the contact sheet of a configuration.

    Args:
      config: as `default_config` gives it.
      path: of the picture; its folder is made.
      examples: rows of single images.

    Returns:
      The path.

    Raises:
      InputError: there is no such data set, or its images do not fit the configuration.
    """
    train_split, _ = named_splits(config.dataset)
    dataset = load_dataset(config.dataset.name, train_split, data_dir=config.dataset.data_dir)
    channels = {"mean": tuple(config.dataset.mean), "std": tuple(config.dataset.std)}
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
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(1.5 * COLUMNS, 1.75 * rows + 0.9), layout="constrained", squeeze=False
    )
    for row, (example, draws) in enumerate(zip(chosen[:examples], drawn, strict=False)):
        for axis, shown in zip(axes[row], [evaluation(example), *draws], strict=True):
            _show(axis, shown["image"], **channels)
        axes[row, 0].set_ylabel(f"class {example['label']}", fontsize="small")
    axes[0, 0].set_title("evaluation", fontsize="medium")
    axes[0, 1].set_title("training", fontsize="medium", loc="left")
    if mixes:
        batch = [draws[0] for draws in drawn[:COLUMNS]]
        for row, (images, targets) in zip(axes[examples:], _mixed(config, batch, dataset.num_classes), strict=True):
            for axis, image, target in zip(row, np.asarray(images), np.asarray(targets), strict=True):
                _show(axis, image, **channels)
                axis.set_xlabel(_describe_target(target), fontsize="small")
            row[0].set_ylabel("mixed batch", fontsize="small")

    changed = [f"{name} {value}" for name, value in config.augment.items() if value != default_config().augment[name]]
    figure.suptitle(f"{config.dataset.name} at {size} x {size}: {', '.join(changed) or 'no augmentation'}", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return path


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


def _show(axis: Any, image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
    axis.imshow(np.clip(image * np.asarray(std) + np.asarray(mean), 0, 1))
    axis.set(xticks=[], yticks=[])


def _describe_target(target: np.ndarray) -> str:
    """The two heaviest classes: what label smoothing gives to all of them is not said of each."""
    heaviest = [label for label in np.argsort(-target)[:2] if target[label] > target.min()]
    return ", ".join(f"{label}: {target[label]:.2f}" for label in heaviest)
