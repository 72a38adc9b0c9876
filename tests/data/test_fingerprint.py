import numpy as np
import pytest
from PIL import Image

from castling_jax.data.fingerprint import check_same_classes, compare_data, fingerprint
from castling_jax.data.sources import Unread, load_dataset
from tests.data.tfds_builders import CLASSES, prepared


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def of(root):
    return fingerprint(*(load_dataset(f"folder:{root}", split) for split in ("train", "val")))


def test_the_same_data_has_the_same_fingerprint(root):
    before = of(root)
    assert compare_data(before, of(root), accept_changes=False) == ""
    assert before["classes"] == ["cat", "dog"]
    assert before["training"]["images"] == 6
    digits = [fingerprint(*(load_dataset("digits", split) for split in ("train", "test"))) for _ in range(2)]
    assert digits[0] == digits[1]


def test_images_that_come_or_go_are_one_sentence_and_can_be_accepted(root, refuses):
    before = of(root)
    (root / "train" / "cat" / "9.png").write_bytes(b"")
    (root / "val" / "dog" / "0.png").unlink()
    said = (
        "the training split holds 7 images instead of 6",
        "; the held-out split holds 3 images instead of 4",
    )
    with refuses("the data has changed since the run began: ", *said, "config.dataset.accept_changes."):
        compare_data(before, of(root), accept_changes=False)
    assert compare_data(before, of(root), accept_changes=True) == "".join(said)


def test_as_many_images_of_other_names(root, refuses):
    before = of(root)
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "8.png")
    with refuses("the training split has other file names;"):
        compare_data(before, of(root), accept_changes=False)


def test_one_image_more_in_one_class_and_less_in_the_other(root, refuses):
    before = of(root)
    (root / "train" / "cat" / "0.png").rename(root / "train" / "dog" / "8.png")
    with refuses("the training split has other file names;"):
        compare_data(before, of(root), accept_changes=False)


def test_other_classes_are_never_accepted(root, refuses):
    before = of(root)
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "zebra")  # all labels move
    with refuses("the data's classes are not the run's ('cat' missing, 'zebra' new): put them back"):
        compare_data(before, of(root), accept_changes=True)
    (root / "train" / "cow").mkdir()
    (root / "train" / "cow" / "0.png").write_bytes(b"")
    with refuses("(3 instead of 2, 'cat' missing, 'cow', 'zebra' new)"):
        compare_data(before, of(root), accept_changes=True)


def test_many_classes_are_not_all_named(refuses):
    with refuses("(7 instead of 2, '2', '3', '4' and 2 others new)"):
        check_same_classes(list("01"), list("0123456"))
    with refuses("(their order has changed)"):
        check_same_classes(list("ab"), list("ba"))


def test_another_version_of_a_tfds_data_set(tmp_path, refuses):
    builder = prepared(tmp_path)
    splits = [load_dataset(builder.name, split, data_dir=tmp_path) for split in ("train", "test")]
    now = fingerprint(*splits)
    assert now["classes"] == list(CLASSES)
    assert now["training"]["version"] == f"{builder.name}/{builder.version}"
    before = now | {"training": now["training"] | {"version": f"{builder.name}/0.9.9"}}
    with refuses(f"the training split is {builder.name}/{builder.version} instead of {builder.name}/0.9.9;"):
        compare_data(before, now, accept_changes=False)


def test_what_is_not_here_has_sizes_alone():
    assert fingerprint(Unread(5, 2), Unread(3, 2)) == {
        "classes": ["0", "1"],
        "training": {"images": 5},
        "held-out": {"images": 3},
    }
