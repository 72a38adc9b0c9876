import chex
import numpy as np
import pytest

from castling_jax.data.loader import evaluation_batches, training_batches
from castling_jax.data.sources import Dataset
from castling_jax.ops.errors import InputError


def numbered(size):
    """A dataset whose images hold their own number."""
    numbers = np.arange(size)
    images = np.broadcast_to(numbers[:, None, None, None], (size, 4, 4, 3)).astype(np.float32) / size
    return Dataset(images, numbers.astype(np.int32), num_classes=size)


def batches(size=12, **options):
    return training_batches(numbered(size), **{"batch_size": 4, "seed": 0, "shift_pixels": 1} | options)


def test_each_epoch_has_every_example_once_in_another_order():
    iterator = batches()
    epochs = [np.concatenate([next(iterator)["label"] for _ in range(3)]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_stream_is_a_function_of_the_seed():
    chex.assert_trees_all_equal(next(batches(seed=1)), next(batches(seed=1)))
    assert not np.array_equal(next(batches(seed=1))["label"], next(batches(seed=2))["label"])


def test_a_run_that_goes_on_gets_the_batches_it_would_have_got():
    iterator = batches()
    for _ in range(5):  # into the second epoch
        next(iterator)
    expected = [next(iterator) for _ in range(3)]
    resumed = batches(first_step=5)
    chex.assert_trees_all_equal([next(resumed) for _ in range(3)], expected)


def test_processes_share_every_batch():
    whole = batches()
    shares = [batches(rows=np.array(rows)) for rows in ([0, 1], [3], [1, 2])]  # tensor parallelism: some have the same
    for _ in range(4):
        expected = next(whole)
        for share, rows in zip(shares, ([0, 1], [3], [1, 2]), strict=True):
            chex.assert_trees_all_equal(next(share), {name: array[rows] for name, array in expected.items()})


@pytest.mark.parametrize("batch_size", [0, 13])
def test_batch_must_fit_the_dataset(batch_size):
    with pytest.raises(InputError, match=f"1 to 12 images .* not {batch_size}"):
        batches(batch_size=batch_size)


@pytest.mark.parametrize("size", [1, 7, 8, 9])
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_counts_every_example_once(size, process_count):
    seen = []
    for rows in np.arange(4).reshape(process_count, -1):
        for batch in evaluation_batches(numbered(size), batch_size=4, rows=rows):
            chex.assert_shape(batch["image"], (4 // process_count, 4, 4, 3))
            seen += list(batch["label"][batch["weight"] == 1])
    assert sorted(seen) == list(range(size))
