"""Batches: an endless shuffled stream for training, and exactly one pass for evaluation."""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from castling_jax.data.sources import Dataset
from castling_jax.data.transforms import normalize, training_example
from castling_jax.ops.errors import InputError

READ_THREADS = 2  # more are slower on small machines, and images in memory need no more
BATCHES_AHEAD = 8  # that are kept ready
Batch = dict[str, np.ndarray]
Rows = Int[np.ndarray, "rows"]


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    shift_pixels: int,
    first_step: int = 0,
    rows: Rows | None = None,
) -> Iterator[Batch]:
    """An endless stream of shuffled, augmented batches; every epoch in another order.

    Batch number `step` is a function of the seed and of the step alone, on any number of processes: a run that goes
    on needs to know nothing but its step.

    Args:
      dataset: examples.
      batch_size: of all processes together.
      seed: of the order and of the augmentations.
      shift_pixels: largest random shift; 0 is none.
      first_step: the number of the first batch that is given.
      rows: which rows of every batch are given; None is all.

    Returns:
      An iterator of {"image": [rows, height, width, 3] in [-1, 1], "label": [rows]}.

    Raises:
      InputError: the batch is larger than the dataset.
    """
    if not 1 <= batch_size <= len(dataset):
        raise InputError(f"a batch must be of 1 to {len(dataset)} images (there are no more), not {batch_size}.")
    examples = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
    examples = examples.random_map(functools.partial(training_example, shift_pixels=shift_pixels))
    chosen = np.arange(batch_size) if rows is None else rows
    steps = grain.MapDataset.range(first_step, sys.maxsize // batch_size)
    batches = steps.map(functools.partial(_batch, examples, batch_size=batch_size, rows=chosen))
    return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


def _batch(examples: grain.MapDataset, step: int, *, batch_size: int, rows: Rows) -> Batch:
    chosen = [examples[step * batch_size + int(row)] for row in rows]
    return {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}


def evaluation_batches(dataset: Dataset, *, batch_size: int, rows: Rows | None = None) -> Iterator[Batch]:
    """One pass over the dataset in batches of one size: the last is padded, and `weight` is 0 where it is.

    Args:
      dataset: examples.
      batch_size: of all processes together.
      rows: which rows of every batch are given; None is all.

    Yields:
      {"image", "label", "weight"}, each of these rows.
    """
    chosen = np.arange(batch_size) if rows is None else rows
    for start in range(0, len(dataset), batch_size):
        indices = start + chosen
        weight = (indices < len(dataset)).astype(np.float32)
        examples = [dataset[index] for index in np.minimum(indices, len(dataset) - 1)]
        yield {
            "image": np.stack([normalize(example["image"]) for example in examples]),
            "label": np.stack([example["label"] for example in examples]),
            "weight": weight,
        }
