"""Batches: an endless shuffled stream for training, and exactly one pass for evaluation."""

import dataclasses
import errno
import functools
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from jaxtyping import Int

from castling_jax.data.sources import Dataset
from castling_jax.errors import DeterministicError, InputError, printable

if TYPE_CHECKING:
    import grain

LOGGER = logging.getLogger(__name__)
PART = 32  # images that one thread reads at a time; small, so that threads share a batch and use little memory
PARTS_AHEAD = 4  # parts that each thread reads ahead
MAX_THREADS = 16  # in one process; more threads would wait for Python's lock more than they work
CORRUPT_IN_A_ROW = 100  # after so many corrupt images, the search for a good one stops
# The system's errors that one file may have while others can be read. Pillow's errors have no number.
OF_ONE_FILE = (
    *(None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ, errno.EINVAL),
)
# ArrayRecord's errors are of the same kind for a damaged record and for an outage, which is in the text.
OUTAGES = tuple(map(os.strerror, (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)))
# The share of corrupt images is taken of the images read, or of this number while fewer are read.
MIN_IMAGES_JUDGED = 10_000
NAMED = 3  # corrupt images that an error message names
_LOGGED: set[str] = set()  # names of the corrupt images that were logged, in training or in an evaluation
Batch = dict[str, np.ndarray]
Rows = Int[np.ndarray, "rows"]
Example = dict[str, Any]
TrainTransform = Callable[[Example, np.random.Generator], Example]
EvalTransform = Callable[[Example], Example]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Draws one of several training transforms for each step: for example, one that makes images of another size.

    All examples of a step get the same transform. It depends on the seed and the step alone.
    """

    transforms: Sequence[TrainTransform]

    def of_step(self, seed: int, step: int) -> TrainTransform:
        """The transform of a step."""
        # Three numbers: an example's generator is seeded by two, (seed, position), so the draws are independent.
        return self._drawn(np.random.default_rng((seed, step, 1)))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Applies a transform that is drawn for this example alone, as pictures of single examples need it."""
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
    """An endless stream of shuffled, augmented batches; every epoch has another order.

    Batch number `step` depends on the seed and the step alone, with any number of processes and workers, so a run
    needs to know nothing but its step to resume.

    The batches are cut from one endless stream of images, and may cross the end of an epoch. Each epoch is
    len(dataset) images of the stream and contains every example exactly once. With `repeats`, an epoch is
    repeats * len(dataset) images, and each example comes `repeats` times in a row, each time augmented anew (Hoffer et
    al. 2020, as in DeiT's recipe). A corrupt example is replaced by the next good one of the dataset.

    Args:
      dataset: the examples.
      batch_size: images in a batch, over all processes.
      seed: seed of the order and the augmentations.
      transform: (example, random generator) -> arrays by name, such as {"image", "label"}, with the same shapes for all
        examples, or for all examples of a step if it is a `OneOf`. It raises an InputError if the image is corrupt.
      repeats: how many times in a row an example comes.
      first_step: number of the first batch.
      rows: the rows of every batch to return; None returns all.
      workers: number of processes that read; 0 reads in threads of this process. With workers, dataset and transform
        must be picklable, and the main program must be guarded by `if __name__ == "__main__"`.
      max_corrupt_share: largest share of corrupt images among the images read; a corrupt image counts once.

    Returns:
      An iterator of the transformed examples' arrays, stacked along a first axis [rows, ...]; labels are int32. It
      raises an InputError when more than max_corrupt_share of the images that this process has read are corrupt.

    Raises:
      InputError: the batch is larger than the dataset.
    """
    if not 1 <= batch_size <= len(dataset):
        raise InputError(f"a batch must have from 1 to {len(dataset)} images (the whole data set), not {batch_size}.")
    import grain  # here, because it imports Orbax, and predictions need neither

    # Shuffle before repeating, so that every epoch has each image once; grain gives each epoch its own order.
    order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
    read = functools.partial(_training_image, dataset, transform, order, seed, repeats, batch_size)
    parts = _Parts(read, batch_size, rows)
    # An "endless" range, kept so small that a position in the stream still fits in 64 bits.
    first, last = first_step * len(parts.rows), sys.maxsize // batch_size
    batches = _batches(parts, range(first, last), workers=workers, max_corrupt_share=max_corrupt_share)
    # Only evaluation needs weights, because it pads: in training every row is a good image.
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
    """One pass over the dataset in batches of one size. The last batch is padded with rows of weight 0.

    A corrupt image also gets the weight 0, and is counted as in training.

    Args:
      dataset: the examples.
      batch_size: images in a batch, over all processes.
      transform: example -> arrays by name, with the same shapes for all examples.
      rows: the rows of every batch to return; None returns all.
      workers: as in `training_batches`.
      max_corrupt_share: as in `training_batches`.

    Returns:
      An iterator of the transformed examples' arrays, stacked as in training, and "weight" [rows].
    """
    parts = _Parts(functools.partial(_evaluation_image, dataset, transform), batch_size, rows)
    count = -(-len(dataset) // batch_size) * len(parts.rows)
    return _batches(parts, range(count), workers=workers, max_corrupt_share=max_corrupt_share)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A transformed example, its weight in an evaluation, and the corrupt images that it stands in for."""

    example: Example
    weight: float
    corrupt: dict[str, str]  # name -> why


def _training_image(
    dataset: Dataset,
    transform: TrainTransform,
    order: "grain.MapDataset",
    seed: int,
    repeats: int,
    batch_size: int,
    position: int,
) -> _Read:
    """Reads the image at a position of the endless stream."""
    transform_of_step = transform.of_step(seed, position // batch_size) if isinstance(transform, OneOf) else transform

    def augmented(example: Example) -> Example:
        # The position, not the example, seeds the augmentation: every repeat and epoch draws anew, on any process.
        return transform_of_step(example, np.random.default_rng((seed, position)))

    return first_good(dataset, augmented, int(order[position // repeats]))


def _evaluation_image(dataset: Dataset, transform: EvalTransform, position: int) -> _Read:
    """Reads the image at a position of the padded dataset."""
    if position >= len(dataset):  # padding: any good image has the right shapes
        read = first_good(dataset, transform, len(dataset) - 1)
        return _Read(read.example, 0.0, {})
    read = first_good(dataset, transform, position)
    # The search for a good image may have passed more corrupt ones; those are counted at their own positions.
    corrupt = dict(itertools.islice(read.corrupt.items(), 1))
    return _Read(read.example, 0.0 if corrupt else 1.0, corrupt)


def first_good(dataset: Dataset, transform: EvalTransform, index: int) -> _Read:
    """Reads the example at an index or, if that one is corrupt, the next good one.

    Raises:
      DeterministicError: all examples are corrupt, or CORRUPT_IN_A_ROW from the index on.
      InputError: the disk or the network fails.
    """
    corrupt: dict[str, str] = {}
    for offset in range(min(len(dataset), CORRUPT_IN_A_ROW)):
        nearby = (index + offset) % len(dataset)
        try:
            return _Read(transform(dataset[nearby]), 1.0, corrupt)
        except InputError as error:
            if _is_outage(error):  # no mark of the image: the same command may read it in a minute
                raise InputError(f"{dataset.describe(nearby)}: {error}") from error
            corrupt[dataset.describe(nearby)] = str(error)
    # So many mean a wrong data set or a broken disk, not a bad image: stop now.
    name, why = next(iter(corrupt.items()))
    raise DeterministicError(f"{len(corrupt)} images in a row are corrupt, the first of them {name}: {why}")


def _is_outage(error: InputError) -> bool:
    """Whether an example could not be read because the disk or the network failed, and not because of its file."""
    if isinstance(error.__cause__, OSError):
        return error.__cause__.errno not in OF_ONE_FILE
    return any(words in str(error) for words in OUTAGES)


class _Parts:
    """Reads parts of batches, each of up to PART rows, by their numbers. Part 0 is the first part of batch 0.

    Args:
      read: position in the stream -> the example there.
      batch_size: images in a batch, over all processes.
      rows: the rows of every batch to read; None reads all.
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
    """Stacks the examples' values; 64-bit integers become 32-bit ones, because JAX has no int64 by default."""
    stacked = np.stack(values, casting="equiv")  # uint8 images among floats would become floats that look normalised
    return stacked.astype(np.int32) if stacked.dtype == np.int64 else stacked


def _batches(parts: _Parts, numbers: range, *, workers: int, max_corrupt_share: float) -> Iterator[Batch]:
    """Reads the parts with these numbers ahead of their use, and joins them into whole batches."""
    import grain

    # Each worker process has one thread; without workers, this process reads with many.
    threads = 1 if workers else min(processors(), MAX_THREADS)
    options = grain.ReadOptions(threads, PARTS_AHEAD * threads)
    stream = grain.MapDataset.range(numbers.start, numbers.stop).map(parts).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain passes absl's flags to its workers, but notebooks and tests parse none
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=PARTS_AHEAD)
        stream = stream.mp_prefetch(options, worker_init_fn=_ignore_signals)
    return _whole(stream, len(parts.rows), max_corrupt_share)


def processors() -> int:
    """The processors that this process may use; in a container, or under taskset, those are not all that there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _ignore_signals(*_: int) -> None:
    """Makes a worker ignore SIGTERM and Ctrl-C, which go to all processes: it has to read until the run has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _whole(stream: "grain.IterDataset", count: int, max_corrupt_share: float) -> Iterator[Batch]:
    """Joins each `count` parts into a batch, and counts its corrupt images."""
    corrupt = _Corrupt(max_corrupt_share)
    iterator = iter(stream)
    try:
        while True:
            parts = []
            for _ in range(count):
                try:
                    parts.append(next(iterator))
                except StopIteration:
                    return  # Python turns a StopIteration that leaves a generator into a RuntimeError
                except RuntimeError as error:
                    raise _lost_worker(error) or error from error
            # The corrupt images are a list of names and reasons. They go to the counter, not into the batch.
            unreadable = [item for part in parts for item in part.pop("corrupt")]
            batch = {name: np.concatenate([part[name] for part in parts], casting="equiv") for name in parts[0]}
            corrupt.add(len(batch["weight"]), unreadable)
            yield batch
    finally:
        iterator.close()


def _lost_worker(error: RuntimeError) -> InputError | None:
    """Grain's error about a worker that died, as a sentence; None for any other error."""
    match = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
    if not match:
        return None
    status = int(match[1])
    fate = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return InputError(
        f"one of the processes that read images {fate}, which happens when memory runs out; the same command goes on, "
        "and fewer config.dataset.workers need less memory."
    )


class _Corrupt:
    """Counts the corrupt images that this process reads, each once however often it is read, and logs their names.

    Images are counted when a batch is used, not when it is read, so the order is the same with any number of threads
    and workers.

    Args:
      max_share: largest share of corrupt images among the images read. Until MIN_IMAGES_JUDGED images are read, the
        share is taken of that many, so that a few corrupt images at the start do not end a run.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._read = 0
        self._named: dict[str, str] = {}  # name -> why

    def add(self, read: int, corrupt: list[tuple[str, str]]) -> None:
        """Counts the images of a batch.

        Raises:
          InputError: too many are corrupt.
        """
        self._read += read
        for name, why in corrupt:
            self._named[name] = why
            if name not in _LOGGED:
                _LOGGED.add(name)
                LOGGER.warning("Corrupt image, skipped: %s: %s", printable(name), printable(why))
        if len(self._named) > self._max_share * max(self._read, MIN_IMAGES_JUDGED):
            # In training a good image takes the place of a corrupt one: the corrupt ones may be more than the read.
            read = max(self._read, len(self._named))
            raise DeterministicError(
                f"{len(self._named):,} of the {read:,} images read so far are corrupt, more than "
                f"config.dataset.max_corrupt_share = {self._max_share:g} allows: {some_named(self._named)}."
            )


def some_named(corrupt: dict[str, str]) -> str:
    """A few of the names, and why they are corrupt; a reason that all share is said once.

    Args:
      corrupt: name -> why.
    """
    more = len(corrupt) - NAMED
    reasons = {why.rstrip(".") for why in corrupt.values()}
    if len(reasons) == 1:
        names = ", ".join(list(corrupt)[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
        return f"{names}: {reasons.pop()}"
    named = [f"{name}: {why.rstrip('.')}" for name, why in corrupt.items()]
    return "; ".join(named[:NAMED]) + (f"; and {more:,} more" if more > 0 else "")
