"""Batches: an endless shuffled stream for training, and exactly one pass for evaluation."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from castling_jax.data.sources import Dataset
from castling_jax.data.transforms import normalize, training_example
from castling_jax.ops.errors import InputError

READ_THREADS = 2  # more are slower on small machines, and images in memory need no more
Batch = dict[str, np.ndarray]


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    shift_pixels: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless stream of shuffled, augmented batches; every epoch in another order.

    The stream is a function of the seed alone. The iterator's get_state and set_state keep its place.

    Args:
      dataset: examples.
      batch_size: of all processes together.
      seed: of the order and of the augmentations.
      shift_pixels: largest random shift; 0 is none.
      process_index: which process this is; each gets its own share of every batch.
      process_count: how many there are.

    Returns:
      An iterator of {"image": [local_batch, height, width, 3] in [-1, 1], "label": [local_batch]}.

    Raises:
      InputError: the batch is larger than the dataset, or the processes do not divide it.
    """
    if not 1 <= batch_size <= len(dataset):
        raise InputError(f"a batch must be of 1 to {len(dataset)} images (there are no more), not {batch_size}.")
    if batch_size % process_count:
        raise InputError(f"{process_count} processes do not divide a batch of {batch_size}.")
    examples = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat()
    examples = examples.random_map(functools.partial(training_example, shift_pixels=shift_pixels))
    if process_count > 1:
        examples = examples[process_index::process_count]
    # Batching before the conversion to an iterator makes the iterator's place a plain batch number.
    batches = examples.batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS)))


def evaluation_batches(
    dataset: Dataset, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """One pass over the dataset in batches of one size: the last is padded, and `weight` is 0 where it is.

    Yields:
      {"image", "label", "weight"}, each of batch_size // process_count examples: this process's share.

    Raises:
      InputError: the processes do not divide the batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"{process_count} processes do not divide an evaluation batch of {batch_size}.")
    local = batch_size // process_count
    for start in range(0, len(dataset), batch_size):
        indices = np.arange(start + process_index * local, start + (process_index + 1) * local)
        weight = (indices < len(dataset)).astype(np.float32)
        examples = [dataset[index] for index in np.minimum(indices, len(dataset) - 1)]
        yield {
            "image": np.stack([normalize(example["image"]) for example in examples]),
            "label": np.stack([example["label"] for example in examples]),
            "weight": weight,
        }
