"""Batches: an endless shuffled stream for training, and exactly one pass for evaluation."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from castling_jax.data.sources import Dataset
from castling_jax.errors import DeterministicError, InputError, printable

LOGGER = logging.getLogger(__name__)
PART = 32  # images that one thread reads at a time: a batch is shared out, and what is read ahead is bounded
PARTS_AHEAD = 4  # for each thread
MAX_THREADS = 16  # in one process; beyond, they wait for Python's lock more than they work
CORRUPT_IN_A_ROW = 100  # after so many, nothing good is looked for any further
MIN_IMAGES_JUDGED = 10_000  # the share of corrupt images is of at least so many
NAMED = 3  # corrupt images in an error message
_LOGGED: set[str] = set()  # the corrupt images that were named, in training or in an evaluation
Batch = dict[str, np.ndarray]
Rows = Int[np.ndarray, "rows"]
Example = dict[str, Any]
TrainTransform = Callable[[Example, np.random.Generator], Example]
EvalTransform = Callable[[Example], Example]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A training transform that is another one in every step, as images of several sizes need it.

    All examples of a step get the same one of `transforms`, which the seed and the step alone decide.
    """

    transforms: Sequence[TrainTransform]

    def of_step(self, seed: int, step: int) -> TrainTransform:
        """The transform of a step. Its draw is apart from those of the examples, (seed, position)."""
        return self._drawn(np.random.default_rng((seed, step, 1)))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """One of the transforms, drawn for this example alone: for pictures."""
        return self._drawn(rng)(example, rng)

    def _drawn(self, rng: np.random.Generator) -> TrainTransform:
        return self.transforms[int(rng.integers(len(self.transforms)))]


def training_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    transform: TrainTransform,
    repeats: int = 1,
    first_step: int = 0,
    rows: Rows | None = None,
    workers: int = 0,
    max_corrupt_share: float = 0.0,
) -> Iterator[Batch]:
    """An endless stream of shuffled, augmented batches; every epoch in another order.

    Batch number `step` is a function of the seed and of the step alone, on any number of processes and workers: a run
    that goes on needs to know nothing but its step.

    The batches cut one endless stream of images, and run over the end of an epoch: of each len(dataset) images from a
    multiple of it on, every one is another example, and none is ever left out. With `repeats` that is said of
    repeats * len(dataset) images, in which each example comes `repeats` times in a row, each time augmented anew
    (Hoffer et al. 2020, as in DeiT's recipe). An example that is corrupt is replaced by the next one of the dataset
    that is not.

    Args:
      dataset: examples.
      batch_size: of all processes together.
      seed: of the order and of the augmentations.
      transform: (example, random generator) -> arrays by name, such as {"image", "label"}, of the same shapes for all
        examples, or for all of a step where it is a `OneOf`. It raises an InputError where the image is corrupt.
      repeats: how often an example comes in a row.
      first_step: the number of the first batch that is given.
      rows: which rows of every batch are given; None is all.
      workers: processes that read; 0 is threads of this one. Dataset and transform must then be picklable, and the main
        program guarded by `if __name__ == "__main__"`.
      max_corrupt_share: of the images read.

    Returns:
      An iterator of the transformed examples' arrays, stacked along a first axis [rows, ...]; integers are int32. It
      raises an InputError when more than max_corrupt_share of the images that this process has read are corrupt.

    Raises:
      InputError: the batch is larger than the dataset.
    """
    if not 1 <= batch_size <= len(dataset):
        raise InputError(f"a batch must be of 1 to {len(dataset)} images (there are no more), not {batch_size}.")
    order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
    read = functools.partial(_training_image, dataset, transform, order, seed, repeats, batch_size)
    parts = _Parts(read, batch_size, rows)
    first, last = first_step * len(parts.rows), sys.maxsize // batch_size
    batches = _batches(parts, range(first, last), workers=workers, max_corrupt_share=max_corrupt_share)
    return ({name: array for name, array in batch.items() if name != "weight"} for batch in batches)


def evaluation_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    transform: EvalTransform,
    rows: Rows | None = None,
    workers: int = 0,
    max_corrupt_share: float = 0.0,
) -> Iterator[Batch]:
    """One pass over the dataset in batches of one size: the last is padded, and `weight` is 0 where it is.

    A corrupt image has the weight 0 too, and is counted as in training.

    Args:
      dataset: examples.
      batch_size: of all processes together.
      transform: example -> arrays by name, of the same shapes for all examples.
      rows: which rows of every batch are given; None is all.
      workers: as in training.
      max_corrupt_share: as in training.

    Returns:
      An iterator of the transformed examples' arrays, stacked as in training, and "weight" [rows].
    """
    parts = _Parts(functools.partial(_evaluation_image, dataset, transform), batch_size, rows)
    count = -(-len(dataset) // batch_size) * len(parts.rows)
    return _batches(parts, range(count), workers=workers, max_corrupt_share=max_corrupt_share)


@dataclasses.dataclass(frozen=True)
class _Read:
    """An example that was read, the weight that it has in an evaluation, and what was corrupt before it."""

    example: Example
    weight: float
    corrupt: dict[str, str]  # name -> why


def _training_image(
    dataset: Dataset,
    transform: TrainTransform,
    order: grain.MapDataset,
    seed: int,
    repeats: int,
    batch_size: int,
    position: int,
) -> _Read:
    """The image at a position of the endless stream."""
    of_step = transform.of_step(seed, position // batch_size) if isinstance(transform, OneOf) else transform

    def augmented(example: Example) -> Example:
        return of_step(example, np.random.default_rng((seed, position)))

    return _first_good(dataset, augmented, int(order[position // repeats]))


def _evaluation_image(dataset: Dataset, transform: EvalTransform, position: int) -> _Read:
    """The image at a position of the padded dataset."""
    if position >= len(dataset):
        read = _first_good(dataset, transform, len(dataset) - 1)
        return _Read(read.example, 0.0, {})
    read = _first_good(dataset, transform, position)
    own = dict(itertools.islice(read.corrupt.items(), 1))  # those behind it have their own turn
    return _Read(read.example, 0.0 if own else 1.0, own)


def _first_good(dataset: Dataset, transform: EvalTransform, index: int) -> _Read:
    """The example at an index or, where that is corrupt, the next one that is not."""
    corrupt: dict[str, str] = {}
    for offset in range(min(len(dataset), CORRUPT_IN_A_ROW)):
        nearby = (index + offset) % len(dataset)
        try:
            return _Read(transform(dataset[nearby]), 1.0, corrupt)
        except InputError as error:
            corrupt[dataset.describe(nearby)] = str(error)
    name, why = next(iter(corrupt.items()))
    raise DeterministicError(f"{len(corrupt)} images in a row are corrupt, the first of them {name}: {why}")


class _Parts:
    """Batches in parts of up to PART rows, numbered from the first part of batch 0 on.

    Args:
      read: position in the stream -> image.
      batch_size: of all processes together.
      rows: of every batch; None is all.
    """

    def __init__(self, read: Callable[[int], _Read], batch_size: int, rows: Rows | None):
        rows = np.arange(batch_size) if rows is None else rows
        self.rows = np.array_split(rows, -(-len(rows) // PART))
        self._read, self._batch_size = read, batch_size

    def __call__(self, number: int) -> dict[str, Any]:
        step, part = divmod(number, len(self.rows))
        read = [self._read(step * self._batch_size + int(row)) for row in self.rows[part]]
        arrays = {name: _stacked([one.example[name] for one in read]) for name in read[0].example}
        return {
            **arrays,
            "weight": np.array([one.weight for one in read], np.float32),
            "corrupt": [item for one in read for item in one.corrupt.items()],
        }


def _stacked(values: list[Any]) -> np.ndarray:
    """Python's integers become int32: JAX has no int64 here."""
    stacked = np.stack(values)
    return stacked.astype(np.int32) if stacked.dtype == np.int64 else stacked


def _batches(parts: _Parts, numbers: range, *, workers: int, max_corrupt_share: float) -> Iterator[Batch]:
    """Whole batches from the parts of these numbers, read ahead."""
    threads = 1 if workers else min(os.cpu_count() or 1, MAX_THREADS)
    options = grain.ReadOptions(threads, PARTS_AHEAD * threads)
    stream = grain.MapDataset.range(numbers.start, numbers.stop).map(parts).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands flags on to its processes; a notebook or a test has none
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=PARTS_AHEAD)
        stream = stream.mp_prefetch(options, worker_init_fn=_ignore_signals)
    return _whole(stream, len(parts.rows), max_corrupt_share)


def _ignore_signals(*_: int) -> None:
    """The workers read on until the run has saved: a cluster's SIGTERM and a terminal's Ctrl-C go to all processes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _whole(stream: grain.IterDataset, count: int, max_corrupt_share: float) -> Iterator[Batch]:
    corrupt = _Corrupt(max_corrupt_share)
    iterator = iter(stream)
    try:
        while True:
            parts = []
            for _ in range(count):
                try:
                    parts.append(next(iterator))
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise _lost_worker(error) or error from error
            unreadable = [item for part in parts for item in part.pop("corrupt")]
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            corrupt.add(len(batch["weight"]), unreadable)
            yield batch
    finally:
        iterator.close()


def _lost_worker(error: RuntimeError) -> InputError | None:
    """What grain says of a worker that is gone, in a sentence; None where it says something else."""
    found = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
    if not found:
        return None
    status = int(found[1])
    said = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return InputError(
        f"one of the processes that read images {said}, as the system does when memory runs out; the same command goes "
        "on, and needs less memory with fewer config.dataset.workers."
    )


class _Corrupt:
    """Counts the corrupt images among those that this process reads, and logs each one's name once.

    Counted where batches are used, not where they are read: so in the same order with any threads and workers.

    Args:
      max_share: of the images read, of MIN_IMAGES_JUDGED at least, so that a few bad images at first end nothing.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._read = self._count = 0
        self._named: dict[str, str] = {}  # name -> why

    def add(self, read: int, corrupt: list[tuple[str, str]]) -> None:
        """Counts the images of a batch.

        Raises:
          InputError: too many are corrupt.
        """
        self._read += read
        self._count += len(corrupt)
        for name, why in corrupt:
            self._named[name] = why
            if name not in _LOGGED:
                _LOGGED.add(name)
                LOGGER.warning("Corrupt image, skipped: %s: %s", printable(name), printable(why))
        if self._count > self._max_share * max(self._read, MIN_IMAGES_JUDGED):
            named = [f"{name}: {why.rstrip('.')}" for name, why in self._named.items()]
            more = f"; and {len(named) - NAMED} others" if len(named) > NAMED else ""
            raise DeterministicError(
                f"{self._count:,} of the {self._read:,} images read so far are corrupt, more than "
                f"config.dataset.max_corrupt_share = {self._max_share:g} allows: "
                f"{'; '.join(named[:NAMED])}{more}."
            )
