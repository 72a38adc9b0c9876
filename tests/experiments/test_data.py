import tarfile

import numpy as np
import pytest
from PIL import Image

from castling_jax.data.arrays import npz
from castling_jax.data.sources import folder
from experiments.data import decode_all, unpack


def make_archive(path, splits=("train", "test")):
    source = path.parent / "source"
    for split in splits:
        for name in ("cat", "dog"):
            (source / split / name).mkdir(parents=True)
            for number in range(21):
                Image.new("RGB", (2, 2)).save(source / split / name / f"{number:04d}.jpg")
    with tarfile.open(path, "w:gz") as archive:
        for split in splits:
            archive.add(source / split, split)
    return path


def test_every_tenth_image_of_a_class_is_for_validation(tmp_path):
    target = tmp_path / "data" / "cifar10"
    unpack(make_archive(tmp_path / "a.tar.gz"), target)
    assert [path.name for path in target.parent.iterdir()] == ["cifar10"]
    found = {split: folder(target, split).files for split in ("train", "val", "test")}
    assert found["val"] == [f"{name}/{number:04d}.jpg" for name in ("cat", "dog") for number in (0, 10, 20)]
    assert len(found["train"]) == 36 and len(found["test"]) == 42
    assert sorted(found["train"] + found["val"]) == found["test"]  # the archive's names are the same in both

    decode_all(target)
    for split in found:
        arrays = npz(target.with_suffix(".npz"), split)
        assert arrays.images.shape == (len(found[split]), 2, 2, 3)
        np.testing.assert_array_equal(arrays.labels, folder(target, split).labels)


def test_nothing_half_unpacked_stays(tmp_path, refuses):
    whole = make_archive(tmp_path / "a.tar.gz")
    content = whole.read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(content[:-100])
    # The checksum, four bytes before the last four, is behind the end of the archive.
    (tmp_path / "changed.tar.gz").write_bytes(content[:-8] + bytes(byte ^ 1 for byte in content[-8:-4]) + content[-4:])
    (tmp_path / "other").mkdir()
    other = make_archive(tmp_path / "other" / "a.tar.gz", splits=("train",))
    target = tmp_path / "data" / "cifar10"
    for archive, why in (
        (tmp_path / "cut.tar.gz", "cannot be unpacked"),
        (tmp_path / "changed.tar.gz", "CRC check failed"),
        (tmp_path / "none.tar.gz", "No such file"),
        (other, "no folder test/"),
    ):
        with refuses(str(archive), why):
            unpack(archive, target)
        assert list(target.parent.iterdir()) == []
    target.mkdir()
    with refuses("exists already"):
        unpack(whole, target)


@pytest.mark.parametrize("member", ["../outside.jpg", "/outside.jpg"])
def test_an_archive_writes_nowhere_else(tmp_path, refuses, member):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(member))
    with refuses("a.tar.gz"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "data" / "cifar10")
    assert not list(tmp_path.rglob("outside.jpg"))
