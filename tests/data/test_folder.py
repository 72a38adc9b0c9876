import numpy as np
import pytest
from PIL import Image

from castling_jax.data.decode import decode
from castling_jax.data.folder import IMAGE_SUFFIXES
from castling_jax.data.sources import find_splits, load_dataset
from tests.data.tfds_builders import prepared


@pytest.fixture
def root(tmp_path):
    for path in ("train/b/2.PNG", "train/b/10.jpeg", "train/a/x.png", "val/b/y.jpg", "train/a/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_files_in_sorted_order_with_the_classes_of_train(root):
    train, val = (load_dataset(f"folder:{root}", split) for split in ("train", "val"))
    assert [train[i]["image"] for i in range(len(train))] == [
        b"train/a/x.png",
        b"train/b/10.jpeg",
        b"train/b/2.PNG",
    ]
    assert [train[i]["label"] for i in range(len(train))] == [0, 1, 1]
    assert train.num_classes == val.num_classes == 2
    assert [val[i] for i in range(len(val))] == [{"image": b"val/b/y.jpg", "label": 1}]  # though val has no a
    assert train.describe(1) == f"'{root}/train/b/10.jpeg'"


def test_a_class_without_images_in_another_split_than_train_is_taken(root):
    before = load_dataset(f"folder:{root}", "val")
    (root / "val" / "a").mkdir(exist_ok=True)
    val = load_dataset(f"folder:{root}", "val")
    assert (len(val), val.classes) == (len(before), before.classes)


def test_a_file_that_is_gone_is_a_corrupt_image(root, refuses):
    train = load_dataset(f"folder:{root}", "train")
    (root / "train" / "a" / "x.png").unlink()
    with refuses("cannot be read", "No such file"):
        train[0]


@pytest.mark.parametrize(
    ("change", "split", "said"),
    [
        (lambda root: None, "vall", ("unknown split", "did you mean 'val'?")),
        (lambda root: (root / "train").rename(root / "training"), "val", ("no folder 'train'",)),
        (lambda root: (root / "val" / "c").mkdir(), "val", ("val/c", "is a class for which")),
        (lambda root: (root / "train" / "c").mkdir(), "train", ("train/c", "holds no images")),
        (lambda root: (root / "test").mkdir(), "test", ("test", "holds no folders")),
    ],
)
def test_what_it_refuses(root, refuses, change, split, said):
    change(root)
    with refuses(*said):
        load_dataset(f"folder:{root}", split)


def test_missing_and_empty(tmp_path, refuses):
    with refuses("there is no folder", "nowhere"):
        load_dataset(f"folder:{tmp_path}/nowhere", "train")
    (tmp_path / "train").mkdir()
    with refuses("holds no folders"):
        load_dataset(f"folder:{tmp_path}", "train")


def files_of(path, split):
    return load_dataset(f"folder:{path}", split).files


def test_folders_in_a_class_are_taken_and_other_files_counted(root):
    for path in (
        "train/a/2024/may/z.jpg",
        "train/a/2024/y.JFIF",
        "train/a/2024/.z.jpg",
        "train/b/raw.dng",
        "train/b/x",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    train = load_dataset(f"folder:{root}", "train")
    assert train.files == ["a/2024/may/z.jpg", "a/2024/y.JFIF", "a/x.png", "b/10.jpeg", "b/2.PNG"]
    assert train[0] == {"image": b"train/a/2024/may/z.jpg", "label": 0}
    assert train.skipped == {".txt": 1, ".dng": 1, "no suffix": 1}


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_pillow_reads_every_suffix(suffix, tmp_path):
    (tmp_path / "a").mkdir()
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM", ".pnm": "PPM", ".tif": "TIFF"}.get(suffix)
    mode = "L" if suffix == ".pgm" else "RGB"
    Image.new(mode, (8, 8), "white").save(tmp_path / "a" / f"image{suffix}", format=kind)
    white = np.asarray(decode(load_dataset(f"folder:{tmp_path}", "train")[0]["image"]))
    np.testing.assert_array_equal(white, np.full((8, 8, 3), 255))


def test_folders_that_are_no_splits_are_classes(root, refuses):
    everything = load_dataset(f"folder:{root / 'train'}", "train")
    assert everything.classes == ("a", "b")
    assert everything.files == files_of(root, "train")
    with refuses("unknown split", "'val'", "known: train"):
        load_dataset(f"folder:{root / 'train'}", "val")


@pytest.fixture
def many(tmp_path):
    """100 files of a, 13 of b, 2 of c and 1 of d."""
    for name, count in (("a", 100), ("b", 13), ("c", 2), ("d", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").touch()
    return tmp_path


def test_a_share_of_each_class_is_held_out(many):
    held_out, rest = files_of(many, "10% of train"), files_of(many, "train without 10%")
    assert sorted(held_out + rest) == sorted(files_of(many, "train"))
    assert [sum(file.startswith(name) for file in held_out) for name in "abcd"] == [10, 1, 1, 0]
    assert held_out == files_of(many, "10% of train")
    # They are drawn, not the first or the last.
    numbers = sorted(int(file[2:-4]) for file in held_out if file.startswith("a"))
    assert numbers[0] < 50 < numbers[-1]
    assert numbers != list(range(numbers[0], numbers[0] + 10))
    labels = load_dataset(f"folder:{many}", "10% of train").labels
    np.testing.assert_array_equal(labels, ["abcd".index(file[0]) for file in held_out])


def test_neither_part_of_a_class_is_empty_and_an_empty_split_is_refused(many, tmp_path, refuses):
    held_out = files_of(many, "90% of train")
    assert [sum(file.startswith(name) for file in held_out) for name in "abcd"] == [90, 12, 1, 0]
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "0.png").touch()
    with refuses("the split '10% of train' of", "holds no images", "config.dataset.eval_split"):
        load_dataset(f"folder:{tmp_path / 'few'}", "10% of train")


def test_splits_in_capitals_are_no_classes(tmp_path, refuses):
    for name in ("Train", "Val"):
        (tmp_path / name / "a").mkdir(parents=True)
    with refuses("has no folder 'train'", "it has 'Train', 'Val'"):
        load_dataset(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "test"), ("train", "val")),
        (("train", "validation", "test"), ("train", "validation")),
        (("train", "valid"), ("train", "valid")),
        (("train", "test"), ("train", "test")),
        (("train",), ("train without 10%", "10% of train")),
        (("cats", "dogs"), ("train without 10%", "10% of train")),
    ],
)
def test_splits_are_found(folders, expected, tmp_path):
    for name in folders:
        (tmp_path / name / "a").mkdir(parents=True)
    assert find_splits(f"folder:{tmp_path}") == expected


def test_splits_of_other_data_are_found(tmp_path, refuses):
    assert find_splits("digits") == ("train", "test")
    prepared(tmp_path)
    assert find_splits("tiny_animals", data_dir=tmp_path) == ("train", "test")
    with refuses("there is no folder"):
        find_splits(f"folder:{tmp_path}/nowhere")
