import errno
import functools
import logging
import multiprocessing
import os
import signal

import chex
import grain
import numpy as np
import pytest

from castling_jax.data import loader
from castling_jax.data.arrays import ArrayDataset
from castling_jax.data.loader import OneOf, evaluation_batches, training_batches
from castling_jax.errors import InputError, refusing


def numbered(size):
    """A dataset whose images hold their own number."""
    numbers = np.arange(size)
    images = np.broadcast_to(numbers[:, None, None, None], (size, 4, 4, 3)).astype(np.float32) / size
    return ArrayDataset(images, numbers.astype(np.int32), num_classes=size)


def noisy(example, rng):
    return example | {"image": example["image"] + rng.random()}


def corrupt_at(corrupt, example, rng=None):
    """A transform; it is a partial so that worker processes can take it."""
    if example["label"] in corrupt:
        raise InputError(f"image {example['label']} cannot be decoded.")
    return example


def failing(error, example, rng=None):
    """A transform, though it is the data set that fails."""
    with refusing((OSError, RuntimeError), "the file cannot be read"):
        raise error


def batches(size=12, **options):
    return training_batches(numbered(size), **{"batch_size": 4, "seed": 0, "transform": noisy} | options)


def labels(iterator, count):
    return [next(iterator)["label"].tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [4, 5, 12])  # 5 does not divide 12: batches run over the end of an epoch
def test_each_epoch_has_every_example_once_in_another_order(batch_size):
    stream = np.concatenate(labels(batches(batch_size=batch_size), 5 * 12 // batch_size))
    epochs = stream.reshape(5, 12)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(12), (5, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 5


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_come_in_a_row_each_augmented_anew(repeats):
    once = np.concatenate(labels(batches(), 6))
    repeated = batches(repeats=repeats)
    found = [next(repeated) for _ in range(3 * repeats)]
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in found]), np.repeat(once[:12], repeats))
    assert len({image.tobytes() for batch in found for image in batch["image"]}) == 12 * repeats


def test_stream_is_a_function_of_the_seed():
    chex.assert_trees_all_equal(next(batches(seed=1)), next(batches(seed=1)))
    first, other = next(batches(seed=1)), next(batches(seed=2))
    assert not np.array_equal(first["label"], other["label"])
    noise = [batch["image"][:, 0, 0, 0] - batch["label"] / np.float32(12) for batch in (first, other)]
    assert not np.intersect1d(*(np.round(values, 5) for values in noise)).size


def test_batches_are_of_the_types_that_the_model_takes():
    batch = next(batches())
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.float32, (4, 4, 4, 3)),
        "label": (np.int32, (4,)),
    }


@pytest.mark.parametrize("first_step", [1, 5])  # in the first epoch, and in the second
def test_a_run_that_goes_on_gets_the_batches_it_would_have_got(first_step):
    iterator = batches(batch_size=5)
    for _ in range(first_step):
        next(iterator)
    expected = [next(iterator) for _ in range(3)]
    resumed = batches(batch_size=5, first_step=first_step)
    chex.assert_trees_all_equal([next(resumed) for _ in range(3)], expected)


@pytest.mark.parametrize(
    "shares",
    [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1], [3], [1, 2]]],  # the last as with tensor parallelism
)
def test_processes_share_every_batch(shares):
    whole, parts = batches(), [batches(rows=np.array(rows)) for rows in shares]
    for _ in range(4):
        expected = next(whole)
        for part, rows in zip(parts, shares, strict=True):
            chex.assert_trees_all_equal(next(part), {name: array[rows] for name, array in expected.items()})


def test_large_batches_are_read_in_parts(monkeypatch):
    expected = [next(iterator) for iterator in [batches(80, batch_size=70)] for _ in range(3)]
    monkeypatch.setattr(loader, "PART", 1000)
    whole = batches(80, batch_size=70)
    chex.assert_trees_all_equal([next(whole) for _ in range(3)], expected)


@pytest.mark.slow
def test_worker_processes_change_nothing():
    options = {"batch_size": 10, "repeats": 2, "first_step": 3, "rows": np.arange(2, 9)}
    iterator = batches(**options)
    expected = [next(iterator) for _ in range(5)]
    for workers in (1, 2):
        iterator = batches(workers=workers, **options)
        chex.assert_trees_all_equal([next(iterator) for _ in range(5)], expected)
    sizes = [
        [
            batch["weight"].sum()
            for batch in evaluation_batches(numbered(9), batch_size=4, transform=dict, workers=workers)
        ]
        for workers in (0, 2)
    ]
    assert sizes == [[4, 4, 1], [4, 4, 1]]


@pytest.mark.slow
def test_worker_processes_outlive_a_sigterm_to_all():
    expected = labels(batches(), 40)
    iterator = batches(workers=2)
    found = labels(iterator, 2)  # one of each, which then has started
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert found + labels(iterator, 38) == expected


@pytest.mark.slow
def test_a_worker_process_that_the_system_kills_is_one_sentence(refuses):
    iterator = batches(workers=2)
    labels(iterator, 2)  # one of each, which then has started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with refuses("one of the processes that read images was killed by SIGKILL", "fewer config.dataset.workers"):
        labels(iterator, 1000)  # beyond what was read ahead


@pytest.mark.slow
def test_worker_processes_count_corrupt_images(caplog):
    options = {"transform": functools.partial(corrupt_at, [1, 5]), "max_corrupt_share": 0.5, "size": 6, "batch_size": 3}
    expected = labels(batches(**options), 4)
    loader._LOGGED.clear()
    caplog.clear()
    iterator = batches(**options, workers=2)
    assert labels(iterator, 4) == expected
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("batch_size", [0, 13])
def test_batch_must_fit_the_dataset(batch_size):
    with pytest.raises(InputError, match=f"1 to 12 images .* not {batch_size}"):
        batches(batch_size=batch_size)


@pytest.mark.parametrize("size", [1, 7, 8, 9])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_counts_every_example_once(size, process_count):
    seen = []
    for rows in np.arange(4).reshape(process_count, -1):
        for batch in evaluation_batches(numbered(size), batch_size=4, transform=dict, rows=rows):
            chex.assert_shape(batch["image"], (4 // process_count, 4, 4, 3))
            seen += list(batch["label"][batch["weight"] == 1])
    assert sorted(seen) == list(range(size))


class TestCorruptImages:
    @pytest.fixture(autouse=True)
    def nothing_named_before(self):
        loader._LOGGED.clear()

    def test_the_next_good_one_takes_their_place(self, caplog):
        caplog.set_level(logging.WARNING)
        replaced = batches(transform=functools.partial(corrupt_at, [3, 4, 11]), max_corrupt_share=0.01)
        expected = np.concatenate(labels(batches(), 9))
        for corrupt, good in ((3, 5), (4, 5), (11, 0)):
            expected[expected == corrupt] = good
        np.testing.assert_array_equal(np.concatenate(labels(replaced, 9)), expected)
        assert sorted(caplog.messages) == [  # once each, though they were read in each of three epochs
            f"Corrupt image, skipped: image {number}: image {number} cannot be decoded." for number in (11, 3, 4)
        ]

    def test_a_name_cannot_write_lines_of_its_own(self, caplog, monkeypatch):
        monkeypatch.setattr(ArrayDataset, "describe", lambda self, index: f"'{index}\n\x1b[2JError.png'")
        next(batches(transform=functools.partial(corrupt_at, range(3)), max_corrupt_share=1.0))
        assert caplog.messages
        assert all(message.isprintable() and "\\n\\x1b[2JError.png" in message for message in caplog.messages)

    def test_processes_agree_on_what_takes_their_place(self):
        options = {"transform": functools.partial(corrupt_at, [3, 4]), "max_corrupt_share": 0.5}
        whole, part = batches(**options), batches(**options, rows=np.array([1, 3]))
        for _ in range(3):
            np.testing.assert_array_equal(next(whole)["label"][[1, 3]], next(part)["label"])

    def test_a_run_stops_above_the_share(self, refuses):
        # 2 of 10,000 images are allowed at any time, and 3 of 12 are corrupt.
        iterator = batches(transform=functools.partial(corrupt_at, [1, 7, 9]), max_corrupt_share=0.0002)
        with refuses("3 of the", "max_corrupt_share = 0.0002", "image 7 cannot be decoded"):
            labels(iterator, 3)

    def test_a_corrupt_image_counts_once_in_all_epochs(self):
        labels(batches(transform=functools.partial(corrupt_at, [7]), max_corrupt_share=0.0001), 30)

    def test_the_share_is_of_all_that_was_read(self, monkeypatch):
        monkeypatch.setattr(loader, "MIN_IMAGES_JUDGED", 12)
        labels(batches(transform=functools.partial(corrupt_at, [7]), max_corrupt_share=1 / 6), 30)

    def test_the_first_few_are_named(self, refuses):
        iterator = batches(transform=functools.partial(corrupt_at, range(6)), max_corrupt_share=0.0, batch_size=12)
        with refuses("of the 12 images read so far are corrupt", "; and 3 more."):
            next(iterator)

    def test_a_reason_that_all_share_is_said_once(self, refuses):
        def transform(example, rng):
            if example["label"] < 4:
                raise InputError("the mask has the label 7.")
            return example

        with refuses("4 of the 12 images", " and 1 more: the mask has the label 7."):
            next(batches(transform=transform, max_corrupt_share=0.0, batch_size=12))

    def test_nothing_but_corrupt_images(self, refuses):
        iterator = batches(transform=functools.partial(corrupt_at, range(12)), max_corrupt_share=1.0)
        with refuses("12 images in a row are corrupt, the first of them image"):
            next(iterator)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EIO, "Input/output error", "3.png"),
            OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
            RuntimeError("read() failed: Input/output error; reading data.array_record; at byte 0"),  # ArrayRecord's
        ],
    )
    def test_an_outage_of_the_disk_is_none(self, error):
        """Another start may read all images: the end has no status that forbids it, as corrupt images have."""
        with pytest.raises(InputError, match="the file cannot be read .*(Input/output error|not connected)") as refused:
            next(batches(transform=functools.partial(failing, error), max_corrupt_share=1.0))
        assert type(refused.value) is InputError

    @pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), OSError("image truncated")])
    def test_an_error_of_a_file_is_one(self, refuses, error):
        with refuses("12 images in a row are corrupt"):
            next(batches(transform=functools.partial(failing, error), max_corrupt_share=1.0))

    def test_evaluation_leaves_them_out(self, refuses):
        options = {"batch_size": 4, "transform": functools.partial(corrupt_at, [2, 3, 6])}
        found = list(evaluation_batches(numbered(7), **options, max_corrupt_share=0.001))
        np.testing.assert_array_equal(np.concatenate([batch["weight"] for batch in found]), [1, 1, 0, 0, 1, 1, 0, 0])
        with refuses("2 of the 4 images read so far are corrupt"):
            list(evaluation_batches(numbered(7), **options))


def shifted(amount, example, rng):
    return example | {"image": example["image"] + np.float32(amount)}


def test_one_of_several_transforms_is_drawn_for_each_step():
    several = OneOf([functools.partial(shifted, amount) for amount in (10, 20, 30)])
    stream, resumed = batches(transform=several), batches(transform=several, first_step=7)
    found = [next(stream) for _ in range(20)]
    amounts = [np.unique(batch["image"] // 10).tolist() for batch in found]
    assert all(len(amount) == 1 for amount in amounts)
    assert {amount for (amount,) in amounts} == {1, 2, 3}
    chex.assert_trees_all_equal([next(resumed) for _ in range(13)], found[7:])
    # The order of the examples, and their draws, are those of any other transform.
    assert [batch["label"].tolist() for batch in found] == labels(batches(), 20)


def test_batches_are_those_of_earlier_versions():
    """Their noise and order, drawn here as the first version drew them: from (seed, position), and grain's shuffle."""
    order = grain.MapDataset.range(12).seed(3).shuffle().repeat()
    stream = batches(seed=3, batch_size=5, repeats=2)
    for step in range(5):
        batch = next(stream)
        for row in range(5):
            position = 5 * step + row
            example = numbered(12)[int(order[position // 2])]
            assert batch["label"][row] == example["label"]
            noise = np.random.default_rng((3, position)).random()
            np.testing.assert_array_equal(batch["image"][row], example["image"] + noise)


def bytes_among_floats(example):
    pixels = np.zeros((4, 4, 3), np.uint8)
    return example | ({"image": pixels} if example["label"] == 3 else {})


@pytest.mark.parametrize("batch_size", [4, 40])  # in one part of a batch, or in another part
def test_bytes_do_not_become_floats_that_look_normalised(batch_size):
    with pytest.raises(TypeError, match="[Cc]annot cast"):
        list(evaluation_batches(numbered(40), batch_size=batch_size, transform=bytes_among_floats))


def test_the_processors_are_those_that_a_process_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {4, 7}, raising=False)
    assert loader.processors() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    assert loader.processors() == 96
