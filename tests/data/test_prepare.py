import gzip
import hashlib
import struct
import sys

import numpy as np
import pytest

from castling_jax.data import prepare
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.preprocessing import Preprocessing
from castling_jax.tools.prepare import main
from tests.data.tfds_builders import encoded, prepared

tfds = pytest.importorskip("tensorflow_datasets")


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A small Fashion-MNIST in the published form, whose checksums TFDS is made to expect: (folder, its arrays)."""
    folder, rng = tmp_path / "published", np.random.default_rng(0)
    folder.mkdir()
    arrays, checksums = {}, {}
    for split, (start, time) in prepare.FASHION_MNIST.items():
        size = {"train": 6, "test": 3}[split]
        arrays[split] = rng.integers(0, 256, (size, 28, 28), np.uint8), np.arange(size, dtype=np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            path = folder / f"{start}-{kind}-ubyte.gz"
            with gzip.GzipFile(path.name[:-3], "wb", mtime=time, fileobj=path.open("wb")) as file:
                file.write(idx(array))
            content = bytearray(path.read_bytes())
            content[8:10] = b"\x00\x03"  # what gzip itself says of its level and of the system
            path.write_bytes(content)
            checksums[f"http://somewhere/{path.name}"] = tfds.download.checksums.UrlInfo(
                size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=path.name
            )
    monkeypatch.setattr(tfds.image_classification.FashionMNIST, "url_infos", checksums)
    return folder, arrays


def check_same(data_dir, arrays):
    for split, (images, labels) in arrays.items():
        dataset = load_dataset("fashion_mnist", split, data_dir=data_dir)
        transform = EvalTransform(Preprocessing(image_size=28, mean=(0.5,) * 3, std=(0.5,) * 3, crop_ratio=0.875))
        examples = [transform(dataset[i]) for i in range(len(dataset))]
        order = [example["label"] for example in examples]
        assert sorted(order) == labels.tolist()
        pixels = np.stack([example["image"][..., 0] for example in examples])
        np.testing.assert_array_equal(pixels, images[order])
        assert dataset.num_classes == 10


def test_fashion_mnist_from_the_published_archives(archives, tmp_path):
    folder, arrays = archives
    said = prepare.prepare("fashion_mnist", data_dir=tmp_path / "data", archives=folder)
    assert "3.0.1: 10 classes" in said
    assert "train: 6 images" in said
    assert f"--config.dataset.name=fashion_mnist --config.dataset.data_dir={tmp_path / 'data'}" in said
    check_same(tmp_path / "data", arrays)
    names = tfds.builder("fashion_mnist", data_dir=tmp_path / "data").info.features["label"].names
    assert names[9] == "Ankle boot"
    again = prepare.prepare("fashion_mnist", data_dir=tmp_path / "data", archives=folder)
    assert again == f"fashion_mnist was prepared before.\n{said}"


def test_fashion_mnist_as_debian_packs_it(archives, tmp_path, monkeypatch):
    folder, arrays = archives
    for path in folder.iterdir():
        content = path.read_bytes()
        name_end = content.index(b"\x00", 10) + 1
        path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03" + content[name_end:])
    monkeypatch.setattr(prepare, "DEBIAN_ARCHIVES", folder)  # found by itself
    prepare.prepare("fashion_mnist", data_dir=tmp_path / "data")
    check_same(tmp_path / "data", arrays)


def test_archives_that_are_not_the_published_ones(archives, tmp_path, refuses):
    folder, _ = archives
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(3, np.uint8))))
    with refuses("t10k-labels-idx1-ubyte.gz' is not the published archive: its SHA-256 is not"):
        prepare.prepare("fashion_mnist", data_dir=tmp_path / "data", archives=folder)
    path.unlink()
    with refuses("there is no archive", "t10k-labels-idx1-ubyte.gz", "apt-get install dataset-fashion-mnist"):
        prepare.prepare("fashion_mnist", data_dir=tmp_path / "data", archives=folder)
    assert not (tmp_path / "data" / "fashion_mnist").exists()


def test_what_is_interrupted_leaves_nothing_that_looks_whole(archives, tmp_path, monkeypatch, refuses):
    folder, arrays = archives

    def interrupted(images, labels):
        yield 0, {"image": encoded(0), "label": 0}
        raise KeyboardInterrupt

    options = {"data_dir": tmp_path / "data", "archives": folder}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("fashion_mnist", **options)
    with refuses("fashion_mnist is not prepared"):
        load_dataset("fashion_mnist", "train", data_dir=tmp_path / "data")
    prepare.prepare("fashion_mnist", **options)
    check_same(tmp_path / "data", arrays)


def test_leftovers_of_a_killed_preparation_are_named(tmp_path):
    builder = prepared(tmp_path)
    (builder.data_path.parent / "incomplete.ABC_1.2.0").mkdir()
    assert "incomplete.ABC_1.2.0 was left by an interrupted preparation" in prepare.prepare(
        "tiny_animals", data_dir=tmp_path
    )


def test_imagenet_names_its_archives(tmp_path, refuses):
    with refuses("ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar", f"'{tmp_path}/downloads/manual' lacks"):
        prepare.prepare("imagenet2012", data_dir=tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    with refuses(f"'{tmp_path}' lacks ILSVRC2012_img_val.tar: put them there, or give their folder as --manual_dir."):
        prepare.prepare("imagenet2012", data_dir=tmp_path, manual_dir=tmp_path)


def test_other_files_to_be_fetched_by_hand(tmp_path, refuses):
    with refuses("diabetic_retinopathy_detection needs files that you fetch by hand", "--manual_dir"):
        prepare.prepare("diabetic_retinopathy_detection", data_dir=tmp_path)


def test_what_needs_tensorflow_says_so(tmp_path, refuses, monkeypatch):
    def needs_it(self, **options):
        try:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        except ModuleNotFoundError as error:
            raise RuntimeError("In <Image>") from error

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", needs_it)
    with refuses("preparing mnist needs TensorFlow", "pip install tensorflow-cpu"):
        prepare.prepare("mnist", data_dir=tmp_path)
    monkeypatch.setattr(prepare, "DEBIAN_ARCHIVES", tmp_path / "nowhere")
    with refuses("or apt-get install dataset-fashion-mnist"):
        prepare.prepare("fashion_mnist", data_dir=tmp_path)


def test_no_network(tmp_path, refuses, monkeypatch):
    def offline(self, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", offline)
    with refuses("mnist could not be fetched or written (no route to host)"):
        prepare.prepare("mnist", data_dir=tmp_path)


def test_refused_before_any_work(tmp_path, refuses):
    with refuses("imdb_reviews has no labelled images"):
        prepare.prepare("imdb_reviews", data_dir=tmp_path)
    with refuses("unknown dataset 'fashion_mnits': did you mean 'fashion_mnist'?"):
        prepare.prepare("fashion_mnits", data_dir=tmp_path)
    with refuses("--archives is for fashion_mnist alone"):
        prepare.prepare("mnist", data_dir=tmp_path, archives=tmp_path)


def test_folder_is_checked_and_counted(tmp_path, capsys, monkeypatch):
    for path in ("train/a/1.png", "train/a/2.png", "train/b/1.png", "val/a/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "meta").mkdir()  # no split
    monkeypatch.setattr(sys, "argv", ["prepare", f"folder:{tmp_path}"])
    main()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 2 classes",
        "  train: 3 images, 1 to 2 in a class",
        "  val: 1 images, 0 to 1 in a class",
        "To train on train and evaluate on val, with images of 224 x 224 pixels:",
        f"  python main.py --config=folder:224 --config.dataset.name=folder:{tmp_path}",
    ]


def test_a_refusal_ends_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", "no_such_dataset_at_all"])
    with pytest.raises(SystemExit, match="unknown dataset"):
        main()


@pytest.mark.slow
def test_the_real_fashion_mnist(tmp_path):
    """Where Debian's package is installed: held against checksums of TFDS's own."""
    if not prepare.DEBIAN_ARCHIVES.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    assert "train: 60,000 images" in prepare.prepare("fashion_mnist", data_dir=tmp_path)
    labels = load_dataset("fashion_mnist", "test", data_dir=tmp_path)
    assert np.bincount([labels[i]["label"] for i in range(len(labels))]).tolist() == [1000] * 10
