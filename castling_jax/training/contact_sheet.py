"""A contact sheet: a picture of what a configuration does to its images, one by one and then as a batch."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import model_arguments, preprocessing_of
from castling_jax.data.loader import first_good
from castling_jax.models.registry import abstract_model
from castling_jax.normalization import denormalize_images
from castling_jax.plots import SMALL, png
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import image_shape, size_text
from castling_jax.storage import write_atomically
from castling_jax.tasks.images import finish_images
from castling_jax.tasks.registry import check_dataset, task_of
from castling_jax.tasks.task import Example, Task
from castling_jax.training.config import default_config
from castling_jax.training.setup import augmentation, load_split, named_splits
from castling_jax.training.step import prepare_batch

COLUMNS = 8  # even: mixing pairs images, and would make the middle one of an odd number its own partner
BATCHES = 3  # rows of prepared batches


def draw_augmentations(config: ConfigDict, path: epath.Path, *, examples: int) -> epath.Path:
    """Writes a configuration's contact sheet to a PNG file, creates its folder if need be, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(draw_sheet(config, examples=examples)))
    return path


def draw_sheet(config: ConfigDict, *, examples: int) -> Figure:
    """Draws a configuration's contact sheet: rows of single images, then batches as the step prepares them.

    Args:
      config: a configuration with the fields of `default_config`.
      examples: number of rows of single images.

    Raises:
      InputError: there is no such data set, or its images do not fit the configuration.
    """
    train_split, _ = named_splits(config.dataset)
    dataset = load_split(config, train_split)
    model = abstract_model(num_classes=dataset.num_classes or None, **model_arguments(config))
    check_dataset(model, dataset)
    task, size = task_of(model).from_config(config, model), model.spec.image_size
    preprocessing = preprocessing_of(config, size)
    evaluation, training = task.eval_transform(preprocessing), augmentation(config, model, preprocessing)

    def checked(example: Example) -> Example:
        # Both refuse a corrupt image, in whose place `first_good` takes the next one, as training does. Evaluation does
        # not read the mask here.
        evaluation(example)
        training(example, np.random.default_rng(config.seed))
        return example

    # Spread over the whole data set, because folders list the images class by class. A batch needs COLUMNS of them.
    places = np.linspace(0, len(dataset) - 1, max(examples, COLUMNS))
    sources = [first_good(dataset, checked, int(index)).example for index in places]
    draws = [
        [training(example, np.random.default_rng((config.seed, row, column))) for column in range(1, COLUMNS)]
        for row, example in enumerate(sources)
    ]

    rows = examples + BATCHES * task.changes_batches
    height, width = image_shape(size)
    row_height = 1.5 * height / width + 0.25  # inches
    figure = Figure(figsize=(1.5 * COLUMNS, row_height * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for row, (example, drawn) in enumerate(zip(sources[:examples], draws, strict=False)):
        for column, seen in enumerate([evaluation(example), *drawn]):
            axis, key = axes[row, column], jax.random.key(config.seed + COLUMNS * row + column)
            _show(axis, _finished(seen, preprocessing, key), preprocessing)
            task.draw(axis, seen, dataset.classes)
        axes[row, 0].set_ylabel(task.caption(example, dataset.classes), fontsize=SMALL)
    axes[0, 0].set_title("evaluation", fontsize="medium")
    axes[0, 1].set_title("training", fontsize="medium", loc="left")
    batches = _prepared(task, [drawn[0] for drawn in draws[:COLUMNS]], preprocessing, config.seed)
    for row, batch in zip(axes[examples:], batches, strict=False):  # no rows for a task that does not change batches
        for axis, seen in zip(row, batch, strict=True):
            _show(axis, seen["image"], preprocessing)
            task.draw(axis, seen, dataset.classes)
            axis.set_xlabel(task.caption(seen, dataset.classes), fontsize=SMALL)
        row[0].set_ylabel("batch", fontsize=SMALL)

    changed = [f"{name} {value}" for name, value in config.augment.items() if value != default_config().augment[name]]
    figure.suptitle(f"{config.dataset.name} at {size_text(size)}: {', '.join(changed) or 'no augmentation'}", wrap=True)
    return figure


def _finished(example: Example, preprocessing: Preprocessing, key: jax.Array) -> np.ndarray:
    """A transformed example's image as the model sees it: normalised, and with noise in an erased box."""
    batch: Any = {name: np.asarray(example[name])[None] for name in ("image", "filled", "erased") if name in example}
    return np.asarray(finish_images(batch, preprocessing, key)["image"][0])


def _prepared(task: Task, examples: list[Example], preprocessing: Preprocessing, seed: int) -> Iterator[list[Example]]:
    """Yields a batch's examples BATCHES times, prepared with another key each time."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    prepare = jax.jit(lambda key, step: prepare_batch(task, stacked, key, step, preprocessing=preprocessing))
    for key in jax.random.split(jax.random.key(seed), BATCHES):
        batch = jax.device_get(prepare(key, 0))
        yield [{name: array[row] for name, array in batch.items()} for row in range(len(examples))]


def _show(axis: Any, image: np.ndarray, preprocessing: Preprocessing) -> None:
    """Shows an image; of one that a segmenter sees in several windows, the first."""
    axis.imshow(denormalize_images(image.reshape(-1, *image.shape[-3:])[0], preprocessing))
    axis.set(xticks=[], yticks=[])
