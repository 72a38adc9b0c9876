import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from castling_jax.data.arrays import ArrayDataset, npz
from castling_jax.data.loader import training_batches
from castling_jax.data.prepare import prepare
from castling_jax.data.sources import find_splits, load_dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.transforms import train_transform
from castling_jax.training.config import default_config


def images_of(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture
def arrays():
    """The arrays of an archive in MedMNIST's layout, whose labels have a second axis."""
    sizes = {"train": 8, "val": 4, "test": 4}
    images = {f"{split}_images": images_of(size, 6, 5, 3, seed=size) for split, size in sizes.items()}
    return images | {f"{split}_labels": np.arange(size, dtype=np.uint8)[:, None] % 4 for split, size in sizes.items()}


@pytest.fixture
def archive(arrays, tmp_path):
    def write(**changes):
        kept = {name: array for name, array in (arrays | changes).items() if array is not None}
        np.savez_compressed(tmp_path / "cells.npz", **kept)
        return tmp_path / "cells.npz"

    return write


def test_a_split_has_the_archives_images_and_labels_in_their_order(archive, arrays):
    path = archive()
    assert find_splits(f"npz:{path}") == ("train", "val")
    dataset = load_dataset(f"npz:{path}", "test")
    assert (len(dataset), dataset.num_classes, dataset.classes) == (4, 4, ("0", "1", "2", "3"))
    for index, image in enumerate(arrays["test_images"]):
        example = dataset[index]
        np.testing.assert_array_equal(example["image"], image)
        assert example["label"] == index and example["image"].dtype == np.uint8


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_a_grey_image_repeats_its_channel(archive, shape):
    grey = images_of(4, *shape)
    image = npz(archive(test_images=grey), "test")[2]["image"]
    np.testing.assert_array_equal(image, np.stack([grey[2].reshape(6, 5)] * 3, -1))


def test_a_part_of_train_is_held_out_where_no_split_is(archive):
    path = archive(val_images=None, test_images=None)
    splits = find_splits(f"npz:{path}")
    assert splits == ("train without 10%", "10% of train")
    rest, held_out = (load_dataset(f"npz:{path}", split) for split in splits)
    assert (len(rest), len(held_out)) == (4, 4)  # at least one of each class
    seen = {image.tobytes() for part in (rest, held_out) for image in part.images}
    assert seen == {image.tobytes() for image in npz(path, "train").images}


def test_a_models_classes_stand_in_for_those_of_train(archive):
    path = archive(train_images=None, train_labels=None)
    assert load_dataset(f"npz:{path}", "test", classes=list("abcde")).num_classes == 5


@pytest.mark.parametrize(
    ("changes", "split", "said"),
    [
        ({"train_images": None, "val_images": None, "test_images": None}, "train", ("must hold arrays train_images",)),
        ({}, "vall", ("unknown split", "did you mean 'val'?")),
        ({"train_labels": None}, "test", ("unknown split", "'train'")),
        ({"test_images": images_of(4, 6, 5, 3) / np.float32(255)}, "test", ("must be uint8", "float32 [4, 6, 5, 3]")),
        ({"test_images": images_of(4, 6, 5, 4)}, "test", ("must be uint8", "[4, 6, 5, 4]")),
        ({"test_images": images_of(3, 6, 5, 3)}, "test", ("has 3 test_images, but 4 test_labels",)),
        ({"test_labels": np.ones((4, 14), int)}, "test", ("number of one class", "[4, 14]")),
        ({"test_labels": np.ones(4)}, "test", ("number of one class", "float64")),
        ({"test_labels": np.array([0, 1, -1, 2])}, "test", ("from 0 to 32,768, not from -1 to 2",)),
        ({"test_labels": np.array([0, 1, 4, 2])}, "test", ("has the class 4, but there are 4",)),
        (
            {"test_images": images_of(0, 6, 5, 3), "test_labels": np.zeros(0, int)},
            "test",
            ("no pixels", "[0, 6, 5, 3]"),
        ),
        ({"test_images": images_of(4, 0, 5)}, "test", ("no pixels", "[4, 0, 5]")),
        ({"train_labels": np.zeros(0, int)}, "test", ("train_labels", "one class for each image, not int64 [0]")),
        ({"test_labels": np.arange(4).astype("m8[s]")}, "test", ("test_labels", "timedelta64")),
        ({"train_labels": np.arange(8)}, "10% of train", ("holds no images", "has too few to hold out")),
        ({"test_images": np.array([None])}, "test", ("cannot be read as an .npz file",)),
    ],
)
def test_what_it_refuses(archive, refuses, changes, split, said):
    path = archive(**changes)
    with refuses(*said):
        load_dataset(f"npz:{path}", split)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 and no more"])
def test_files_that_are_no_archive(tmp_path, refuses, content):
    path = tmp_path / "cells.npz"
    if content is not None:
        path.write_bytes(content)
    with refuses(str(path), "cannot be read"):
        load_dataset(f"npz:{path}", "train")


def test_a_file_in_an_archive_that_is_no_array(archive, refuses):
    path = archive(test_images=None)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("test_images.npy", b"text")
    with refuses("test_images", "must be uint8"):
        load_dataset(f"npz:{path}", "test")


def test_a_split_needs_a_name(archive, refuses):
    path = archive(**dict.fromkeys([f"{split}_images" for split in ("train", "val", "test")]), _images=0, _labels=0)
    with refuses("must hold arrays train_images"):
        find_splits(f"npz:{path}")


def test_an_npy_file_is_no_archive(tmp_path, refuses):
    np.save(tmp_path / "cells.npy", np.zeros(3))
    with refuses("cannot be read as an .npz file"):
        load_dataset(f"npz:{tmp_path / 'cells.npy'}", "train")


def test_prepare_counts_the_images_and_names_the_command(archive):
    lines = prepare(f"npz:{archive(val_images=images_of(4, 3, 3))}").splitlines()
    assert lines[0].endswith("cells.npz: 4 classes")
    assert lines[1] == "  train: 8 images of 5 x 6 pixels"
    assert lines[2] == "  val: 4 images of 3 x 3 pixels"
    assert "--config=folder:5" in lines[-1] and "npz:" in lines[-1]


def test_batches_are_those_of_the_same_images_in_files(tmp_path):
    images = images_of(12, 8, 8, 3)
    for index, image in enumerate(images):
        file = tmp_path / "train" / f"class{index // 6}" / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    np.savez(tmp_path / "same.npz", train_images=images, train_labels=np.arange(12) // 6)
    config, preprocessing = default_config(), Preprocessing(8)
    config.augment.update(flip=0.5, shift_pixels=2, color_jitter=0.3)
    options = {"batch_size": 4, "seed": 3, "transform": train_transform(config.augment, preprocessing)}
    files, arrays = (
        training_batches(load_dataset(name, "train"), **options)
        for name in (f"folder:{tmp_path}", f"npz:{tmp_path / 'same.npz'}")
    )
    for _ in range(6):
        expected, batch = next(files), next(arrays)
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_an_evaluation_sees_the_pixels_as_they_are():
    dataset = ArrayDataset(images_of(2, 8, 8, 3), np.arange(2), 2)
    seen = EvalTransform(Preprocessing(8))(dataset[1])["image"]
    np.testing.assert_array_equal(seen, dataset.images[1])


def test_an_image_file_is_opened_once(monkeypatch):
    opened = []
    open_file = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file.getvalue()) or open_file(file))
    file = io.BytesIO()
    Image.fromarray(images_of(1, 8, 8, 3, seed=1)[0]).save(file, "png")  # no other test has this image
    config = default_config()
    config.augment.update(flip=0.5, shift_pixels=2)
    transform = train_transform(config.augment, Preprocessing(8))
    transform({"image": file.getvalue(), "label": 0}, np.random.default_rng(0))
    assert opened.count(file.getvalue()) == 1  # threads of other tests may still read their own files
