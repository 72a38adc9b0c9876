import subprocess
import sys
import textwrap

import numpy as np
import pytest

from castling_jax.data import digits
from castling_jax.data.sources import DIGITS_SPLITS, load_dataset
from castling_jax.errors import InputError
from tests.data.tfds_builders import CLASSES, encoded, prepared


@pytest.mark.parametrize(("split", "size"), [("train", 1437), ("test", 360), ("minitrain", 1149), ("minival", 288)])
def test_digits_are_grey_images_in_three_channels(split, size):
    dataset = load_dataset("digits", split)
    assert len(dataset) == size
    assert dataset.images.shape == (size, 8, 8, 3)
    assert dataset.images.dtype == np.float32
    assert dataset.images.min() == 0
    assert dataset.images.max() == 1
    np.testing.assert_array_equal(dataset.images[..., 0], dataset.images[..., 2])
    assert set(dataset.labels) == set(range(dataset.num_classes))


@pytest.mark.parametrize(("whole", "part"), [("train", "test"), ("minitrain", "minival")])
def test_held_out_fifth_is_stratified(whole, part):
    large, small = (np.bincount(load_dataset("digits", split).labels) for split in (whole, part))
    # Rounding to whole images moves each class by less than one.
    np.testing.assert_array_less(np.abs(small - (large + small) / 5), 1)


def test_digits_are_scikit_learns(monkeypatch):
    """The pixels and labels are load_digits', and the splits are those that train_test_split draws."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    minitrain, minival = train_test_split(train, test_size=0.2, stratify=labels[train], random_state=0)
    for split, members in {"train": train, "test": test, "minitrain": minitrain, "minival": minival}.items():
        for file in (digits.FILE, "no/such/file"):
            monkeypatch.setattr(digits, "FILE", file)
            images, targets = digits.read_digits(split)
            np.testing.assert_array_equal(images.reshape(-1, 64), pixels[np.sort(members)])
            np.testing.assert_array_equal(targets, labels[np.sort(members)])
            assert targets.dtype == np.int32


def test_splits_are_disjoint_and_complete():
    def images_of(split):
        return {image.tobytes() for image in load_dataset("digits", split).images}

    images = {split: images_of(split) for split in DIGITS_SPLITS}
    assert not images["train"] & images["test"]
    assert not images["minitrain"] & images["minival"]
    assert images["minitrain"] | images["minival"] == images["train"]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown dataset 'digit': did you mean 'digits'"):
        load_dataset("digit", "train")
    with pytest.raises(InputError, match="unknown split of digits 'tset': did you mean 'test'"):
        load_dataset("digits", "tset")
    for name, said in [
        ("fashion_mnst", "did you mean 'fashion_mnist'?"),
        ("/data/flowers", "not '/data/flowers': did you mean 'folder:/data/flowers'?"),
        ("qqqq", "tensorflow-datasets has none of this name"),
        ("mnist:9.9.9", "only: 3.0.1"),
        ("emnist/leters", "leters not found"),
        ("huggingface:mnist", "NAME[/CONFIG][:VERSION]"),
        ("folder", "unknown dataset 'folder'"),
    ]:
        with pytest.raises(InputError) as caught:
            load_dataset(name, "train", data_dir=tmp_path)
        assert said in str(caught.value), caught.value


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepared(folder)
    return folder


class TestTfds:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_encoded_images_and_labels(self, data_dir, in_memory, monkeypatch):
        if not in_memory:
            monkeypatch.setattr("castling_jax.data.sources.IN_MEMORY_BYTES", 0)
        dataset = load_dataset("tiny_animals", "train", data_dir=data_dir)
        assert isinstance(dataset.source, list) == in_memory
        assert dataset.num_classes == len(CLASSES)
        examples = [dataset[np.int64(i)] for i in range(len(dataset))]
        numbers = [int(dataset.describe(i).split("train")[2].removesuffix(".png'")) for i in range(len(dataset))]
        assert sorted(numbers) == list(range(10))
        assert examples == [{"image": encoded(number), "label": number % 3} for number in numbers]

    def test_notation_of_splits(self, data_dir):
        def examples(split):
            dataset = load_dataset("tiny_animals:1.2.0", split, data_dir=data_dir)
            return [dataset[i] for i in range(len(dataset))]

        whole = examples("train")
        assert examples("train[:70%]") == whole[:7]
        assert examples("train[7:]+test") == whole[7:] + examples("test")

    @pytest.mark.parametrize(
        ("split", "said"),
        [
            ("tran", ("unknown split of tiny_animals 'tran'", "did you mean 'train'?")),
            ("train+valid", ("'valid'",)),
            ("train[:x]", ("'train[:x]'", "cannot be read")),
            ("train[:0]", ("'train[:0]'",)),
        ],
    )
    def test_splits_it_refuses(self, data_dir, refuses, split, said):
        with refuses(*said):
            load_dataset("tiny_animals", split, data_dir=data_dir)

    def test_what_is_not_prepared_names_the_command(self, tmp_path, refuses):
        with refuses("not prepared", f"run python -m castling_jax prepare mnist --data_dir={tmp_path}."):
            load_dataset("mnist", "train", data_dir=tmp_path)

    def test_other_formats_are_refused(self, tmp_path, refuses):
        import tensorflow_datasets as tfds

        class Mnist(tfds.image_classification.MNIST, skip_registration=True):
            name = "mnist"

            def _split_generators(self, manager):
                return {"train": iter([(0, {"image": encoded(0), "label": 1})])}

        Mnist(data_dir=tmp_path, file_format="riegeli")
        builder = Mnist(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        for path in builder.data_path.glob("dataset_info.json"):
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        with refuses("prepared as tfrecord", "castling_jax prepare mnist"):
            load_dataset("mnist", "train", data_dir=tmp_path)

    def test_other_than_labelled_images_is_refused(self, tmp_path, refuses):
        import tensorflow_datasets as tfds

        image, label, text = tfds.features.Image(), tfds.features.ClassLabel(names=["a"]), tfds.features.Text()
        example = {"image": encoded(0), "label": 0}
        prepared(
            tmp_path,
            name="only_text",
            features={"text": text, "label": label},
            supervised=None,
            splits={"train": [{"text": "a", "label": 0}]},
        )
        with refuses("only_text has no labelled images: its features are"):
            load_dataset("only_text", "train", data_dir=tmp_path)
        prepared(
            tmp_path,
            name="captions",
            features={"image": image, "label": text},
            splits={"train": [example | {"label": "a"}]},
        )
        with refuses("labels of the dataset captions are not classes"):
            load_dataset("captions", "train", data_dir=tmp_path)
        prepared(
            tmp_path,
            name="unlabelled",
            features={"picture": image, "kind": label},
            supervised=("picture", "kind"),
            splits={"train": [{"picture": encoded(0), "kind": 0}], "test": [{"picture": encoded(0), "kind": -1}]},
        )
        assert load_dataset("unlabelled", "train", data_dir=tmp_path)[0] == example
        with refuses("'test' of unlabelled has no labels"):
            load_dataset("unlabelled", "test", data_dir=tmp_path)

    def test_a_damaged_record_is_a_corrupt_image(self, tmp_path, refuses):
        builder = prepared(tmp_path)
        [file] = builder.data_path.glob("*train*")
        content = file.read_bytes()
        intact = load_dataset("tiny_animals", "train", data_dir=tmp_path)
        place = content.index(intact[4]["image"][-40:-20])  # PNG does not compress any further, so it is found as it is
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        damaged = load_dataset("tiny_animals", "train", data_dir=tmp_path)
        assert [damaged[i] for i in (3, 5)] == [intact[i] for i in (3, 5)]
        with refuses("the record cannot be read", "mismatch"):
            damaged[4]
        assert damaged.describe(4) == "tiny_animals train 4"

    def test_imagenet(self):
        import tensorflow_datasets as tfds

        def source(self, split, decoders=None, **options):
            assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
            return [{"image": encoded(0, "JPEG"), "label": 999, "file_name": b"n15075141_54.JPEG"}]

        with tfds.testing.mock_data(as_data_source_fn=source):
            dataset = load_dataset("imagenet2012", "validation")
        assert dataset.num_classes == 1000
        assert dataset[0] == {"image": encoded(0, "JPEG"), "label": 999}
        assert dataset.describe(0) == "imagenet2012 validation 0 'n15075141_54.JPEG'"

    def test_reading_does_without_tensorflow(self, data_dir):
        """In a process of its own, where TensorFlow cannot be found even if it is installed."""
        program = f"""
            import sys
            from importlib.machinery import PathFinder

            class Hiding(PathFinder):
                @classmethod
                def find_spec(cls, name, *arguments):
                    return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, *arguments)

            sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
            from castling_jax.data.loader import training_batches
            from castling_jax.data.sources import load_dataset
            from castling_jax.data.transforms import EvalTransform
            from castling_jax.preprocessing import Preprocessing

            dataset = load_dataset("tiny_animals", "train", data_dir={str(data_dir)!r})
            transform = EvalTransform(Preprocessing(image_size=6, mean=(0.5,) * 3, std=(0.5,) * 3, crop_ratio=1.0))
            batches = training_batches(
                dataset, batch_size=4, seed=0, transform=lambda example, rng: transform(example)
            )
            print(next(batches)["image"].shape, "tensorflow" in sys.modules, flush=True)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
        assert done.stdout == "(4, 6, 6, 3) False\n", done.stderr
