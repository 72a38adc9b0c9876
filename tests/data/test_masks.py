"""Data sets of masks: folders of images and label PNGs, and tensorflow-datasets; and what they refuse."""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from castling_jax.data.masks import IGNORED, decode_mask, has_labels, read_labels, sizes_of, table_of
from castling_jax.data.prepare import prepare
from castling_jax.data.sources import find_splits, load_dataset
from tests.data.mask_files import NAMES, SIZES, VOID, labels, png, write_masks
from tests.data.tfds_builders import encoded, prepared

MASKS = [labels(size, number) for number, size in enumerate(SIZES)]


def load(root, split="train", **options):
    return load_dataset(f"masks:{root}", split, ignore_label=VOID, **options)


def truth(mask):
    return np.where(mask == VOID, IGNORED, mask)


class TestFolder:
    def test_images_and_labels(self, tmp_path):
        """Half of the masks have a palette, whose indices count."""
        dataset = load(write_masks(tmp_path))
        assert (dataset.annotation, dataset.classes, dataset.num_classes, len(dataset)) == ("mask", NAMES, 3, 4)
        for index, mask in enumerate(MASKS):
            example = dataset[index]
            assert example["image"] == (tmp_path / "train" / f"{index:03}.png").read_bytes()
            np.testing.assert_array_equal(read_labels(example, mask.shape), truth(mask))
        assert dataset.describe(2) == f"'{tmp_path}/train/002.png'"
        assert sorted(sizes_of(dataset)) == sorted(mask.shape for mask in MASKS)
        assert len(sizes_of(load(tmp_path, "75% of train"))) == 3
        assert len(pickle.loads(pickle.dumps(dataset))) == 4

    def test_names_from_a_windows_editor(self, tmp_path):
        """A byte order mark, line ends of two bytes, and a suffix in capitals."""
        write_masks(tmp_path)
        (tmp_path / "classes.txt").write_bytes("\r\n".join(NAMES).encode("utf-8-sig"))
        (tmp_path / "train_labels" / "000.png").rename(tmp_path / "train_labels" / "000.PNG")
        dataset = load(tmp_path)
        assert dataset.classes == NAMES
        np.testing.assert_array_equal(read_labels(dataset[0], SIZES[0]), truth(MASKS[0]))

    def test_folders_below_and_other_formats(self, tmp_path):
        write_masks(tmp_path)
        for folder in ("train", "train_labels"):
            (tmp_path / folder / "aachen").mkdir()
            (tmp_path / folder / "002.png").rename(tmp_path / folder / "aachen" / "002.png")
        Image.open(tmp_path / "train" / "000.png").save(tmp_path / "train" / "000.jpg")
        (tmp_path / "train" / "000.png").unlink()
        dataset = load(tmp_path)
        assert dataset.files == ("000.jpg", "001.png", "003.png", "aachen/002.png")
        np.testing.assert_array_equal(read_labels(dataset[3], SIZES[2]), truth(MASKS[2]))

    def test_classes_without_names_are_the_numbers_in_the_split_train(self, tmp_path):
        write_masks(tmp_path, "train", names=None)
        write_masks(tmp_path, "val", names=None, sizes=SIZES[:1])
        for mask in (tmp_path / "val_labels").iterdir():  # a split that has the first class alone
            mask.write_bytes(png(np.zeros(SIZES[0], np.uint8)))
        for split in ("train", "val", "50% of train"):
            assert load(tmp_path, split).classes == ("0", "1", "2")
        (tmp_path / "train_labels" / "001.png").write_bytes(b"damaged")
        assert load(tmp_path, "val").classes == ("0", "1", "2")
        # 255 is the label of void unless the caller says otherwise, and 11 then is a class.
        assert load_dataset(f"masks:{tmp_path}", "train").num_classes == VOID + 1
        assert load(tmp_path, "val", classes=["a", "b"]).classes == ("a", "b")

    def test_classes_are_found_by_name_among_a_models(self, tmp_path):
        dataset = load(write_masks(tmp_path), classes=["car", "tree", "road", "sky"])
        assert dataset.classes == ("car", "tree", "road", "sky")
        expected = np.array([3, 2, 0, *[IGNORED] * 9])[MASKS[0]]
        np.testing.assert_array_equal(read_labels(dataset[0], SIZES[0]), expected)

    def test_splits(self, tmp_path):
        write_masks(tmp_path, "train")
        assert find_splits(f"masks:{tmp_path}") == ("train without 10%", "10% of train")
        rest, held_out = (load(tmp_path, split) for split in find_splits(f"masks:{tmp_path}"))
        assert sorted([*rest.files, *held_out.files]) == list(load(tmp_path).files)
        write_masks(tmp_path, "val", seed=9)
        (tmp_path / "notes").mkdir()
        assert find_splits(f"masks:{tmp_path}") == ("train", "val")
        assert load(tmp_path, "val").contents() == load(tmp_path).contents()
        other = os.fsdecode(b"\xff.png")  # a name that is not UTF-8
        (tmp_path / "val" / "000.png").rename(tmp_path / "val" / other)
        (tmp_path / "val_labels" / "000.png").rename(tmp_path / "val_labels" / other)
        assert load(tmp_path, "val").contents() != load(tmp_path).contents()

    def test_a_split_without_any_class(self, tmp_path):
        assert has_labels(load(write_masks(tmp_path)))
        for mask in (tmp_path / "train_labels").iterdir():
            mask.write_bytes(png(np.full((4, 4), VOID, np.uint8)))
        assert not has_labels(load(tmp_path))


def test_prepare_checks_and_counts(tmp_path, refuses):
    for split in ("train", "val"):
        write_masks(tmp_path, split)
        for number, size in enumerate(SIZES):
            (tmp_path / f"{split}_labels" / f"{number:03}.png").write_bytes(png(np.zeros(size, np.uint8)))
    mask = np.zeros(SIZES[0], np.uint8)
    mask[:12], mask[12:18] = 1, IGNORED
    (tmp_path / "val_labels" / "000.png").write_bytes(png(mask))
    pixels = sum(height * width for height, width in SIZES)
    road, void = 100 * 12 * 30 / pixels, 100 * 6 * 30 / pixels
    assert prepare(f"masks:{tmp_path}").splitlines() == [
        f"{tmp_path}: 3 classes",
        "  train: 4 images, masks of up to 32 x 32 pixels: 100.0 % sky; no mask has road, car",
        f"  val: 4 images, masks of up to 32 x 32 pixels: {100 - road - void:.1f} % sky, {road:.1f} % road, "
        f"{void:.1f} % without a class; no mask has car",
        "To train on it, with images of 24 x 24 pixels:",
        f"  python main.py --config=masks:24 --config.dataset.name=masks:{tmp_path}",
    ]
    for field, bad in (("ignore_label", 256), ("first_label", -1)):
        with refuses(f"{field} must be from 0 to", f"not {bad}."):
            prepare(f"masks:{tmp_path}", **{field: bad})
    (tmp_path / "val_labels" / "001.png").write_bytes(png(np.zeros((3, 4), np.uint8)))
    (tmp_path / "val_labels" / "002.png").write_bytes(png(np.full(SIZES[2], 9, np.uint8)))
    with refuses(
        "2 of the 4 masks of val cannot be used: ", "001.png': the mask has 4 x 3", "002.png': the mask has the"
    ):
        prepare(f"masks:{tmp_path}")


class TestRefusals:
    def test_folders(self, tmp_path, refuses):
        with refuses(f"there is no folder '{tmp_path}/nowhere'"):
            load(tmp_path / "nowhere")
        write_masks(tmp_path)
        with refuses(f"unknown split of '{tmp_path}' 'tran': did you mean 'train'?"):
            load(tmp_path, "tran")
        with refuses(f"'{tmp_path}/train' has no folder 'train' with a folder 'train_labels' beside it, for the masks"):
            load(tmp_path / "train")
        with refuses("config.dataset.ignore_label = 1 is the number of the class 'road'."):
            load_dataset(f"masks:{tmp_path}", "train", ignore_label=1)
        with refuses(f"'{tmp_path}/classes.txt' has the class 'car', which the model does not have."):
            load(tmp_path, classes=["sky", "road"])
        (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
        with refuses(f"'{tmp_path}/classes.txt' cannot be read"):
            load(tmp_path)
        (tmp_path / "classes.txt").write_text("\n")
        with refuses(f"'{tmp_path}/classes.txt' lists no class: it needs a name for each, one a line."):
            load(tmp_path)
        (tmp_path / "classes.txt").write_text("sky\nroad\nroad\n")
        with refuses(f"'{tmp_path}/classes.txt' lists 'road' 2 times, and it may list a name once."):
            load(tmp_path)
        (tmp_path / "classes.txt").write_text("\n".join(f"class {number}" for number in range(255)))
        with refuses("the number of classes must be at most what masks of 8 bits have room for, 254, not 255."):
            load(tmp_path)

    def test_pairs(self, tmp_path, refuses):
        write_masks(tmp_path)
        twin = tmp_path / "train" / "002.jpg"
        Image.open(tmp_path / "train" / "002.png").save(twin)
        with refuses(f"'{tmp_path}/train' has two files of the name '002', and may have one."):
            load(tmp_path)
        twin.rename(tmp_path / "train_labels" / "002.PNG")
        with refuses(f"'{tmp_path}/train_labels' has two files of the name '002', and may have one."):
            load(tmp_path)
        (tmp_path / "train_labels" / "002.PNG").unlink()
        (tmp_path / "train_labels" / "001.png").rename(tmp_path / "moved.png")
        with refuses(f"'{tmp_path}/train_labels' has no label PNG of the name '001'; it has '000.png': a mask has its"):
            load(tmp_path)
        (tmp_path / "train_labels" / "003.png").unlink()
        with refuses(f"'{tmp_path}/train_labels' has no label PNG of the name '001' (2 are missing)"):
            load(tmp_path)
        for number in (1, 2, 3):
            (tmp_path / "train" / f"{number:03}.png").unlink()
        with refuses(f"'{tmp_path}/train' has no image of the name '002'"):
            load(tmp_path)
        for folder in ("train", "train_labels"):
            for file in (tmp_path / folder).iterdir():
                file.unlink()
        with refuses(f"the split 'train' of '{tmp_path}' holds no images."):
            load(tmp_path)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
    def test_masks_of_colours_or_wide_numbers(self, tmp_path, refuses, mode):
        write_masks(tmp_path)
        if mode == "I;16":
            Image.fromarray(MASKS[0].astype(np.uint16)).save(tmp_path / "train_labels" / "000.png")
            kind = "numbers of 16 bits or more"
        else:
            (tmp_path / "train_labels" / "000.png").write_bytes(png(MASKS[0], mode))
            kind = "colours and not numbers of classes"
        with refuses(f"the first mask: the pixels are {kind}: write masks of 8 bits, as docs/howto/segmentation.md"):
            load(tmp_path)

    def test_masks_without_any_class(self, tmp_path, refuses):
        write_masks(tmp_path, names=None)
        for mask in (tmp_path / "train_labels").iterdir():
            mask.write_bytes(png(np.full((4, 4), VOID, np.uint8)))
        with refuses("none of the 4 masks has a pixel with a class."):
            load(tmp_path)

    def test_one_mask(self, tmp_path, refuses):
        """What a transform refuses, and training counts as corrupt."""
        dataset = load(write_masks(tmp_path))
        with refuses("the mask has 30 x 24 pixels, but its image has 24 x 30."):
            read_labels(dataset[0], (30, 24))
        with refuses("the mask cannot be decoded: it has no format that Pillow knows."):
            read_labels(dataset[0] | {"mask": b"no image"}, SIZES[0])
        with refuses("the mask has the label 7, but the classes have the labels 0 to 2: set", "ignore_label = 7 if 7"):
            read_labels(dataset[0] | {"mask": png(np.uint8([[0, 7]]))}, (1, 2))
        with refuses("the file is a JPEG, and masks are PNGs: a JPEG, for one, changes the numbers."):
            read_labels(dataset[0] | {"mask": encoded(0, "JPEG", size=SIZES[0])}, SIZES[0])
        with refuses("the pixels are colours and not numbers of classes"):
            read_labels(dataset[0] | {"mask": png(MASKS[0], "RGB")}, SIZES[0])
        (tmp_path / "train_labels" / "000.png").unlink()
        with refuses("the mask cannot be read (No such file or directory)"):
            dataset[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_numbers_of_few_bits(bits):
    """Grey PNGs that Pillow does not write: their rows are packed by hand (PNG specification, section 7.2)."""
    numbers = (np.arange(16).reshape(2, 8) % 2**bits).astype(np.uint8)
    packed = np.packbits((numbers[:, :, None] >> np.arange(bits)[::-1]) & 1, axis=None).reshape(2, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    np.testing.assert_array_equal(decode_mask(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)), numbers)


def test_classes_that_start_at_another_number(tmp_path):
    write_masks(tmp_path, names=None)
    numbered_from_5 = [np.where(mask == VOID, 0, mask + 5).astype(np.uint8) for mask in MASKS]
    for index, mask in enumerate(numbered_from_5):
        (tmp_path / "train_labels" / f"{index:03}.png").write_bytes(png(mask))
    dataset = load_dataset(f"masks:{tmp_path}", "train", first_label=5)
    assert dataset.classes == ("0", "1", "2")
    np.testing.assert_array_equal(read_labels(dataset[0], SIZES[0]), truth(MASKS[0]))
    assert prepare(f"masks:{tmp_path}", first_label=5).endswith(f"masks:{tmp_path} --config.dataset.first_label=5")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    np.testing.assert_array_equal(
        read_labels(load_dataset(f"masks:{tmp_path}", "train", first_label=5)[1], SIZES[1]), truth(MASKS[1])
    )


def test_tables():
    table = table_of(range(3), 7, first=1)
    assert table[:8].tolist() == [IGNORED, 0, 1, 2, 254, 254, 254, IGNORED]
    assert table_of(range(3))[255] == IGNORED
    assert table_of([2, 0], 0).tolist()[:2] == [IGNORED, 0]


class TestTfds:
    """Written by TFDS itself, or mocked under the names of its own data sets."""

    def test_any_data_set_with_one_more_image(self, tmp_path):
        import tensorflow_datasets as tfds

        features = {"image": tfds.features.Image(), "seg": tfds.features.Image(shape=(None, None, 1))}
        examples = [{"image": encoded(i, size=SIZES[i]), "seg": png(MASKS[i])} for i in range(4)]
        prepared(tmp_path, name="tiny_streets", features=features, supervised=None, splits={"train": examples})
        dataset = load_dataset("tiny_streets", "train", data_dir=tmp_path, ignore_label=VOID)
        assert (dataset.annotation, dataset.classes) == ("mask", ("0", "1", "2"))
        number_of = {encoded(number, size=size): number for number, size in enumerate(SIZES)}
        numbers = [number_of[dataset[i]["image"]] for i in range(4)]
        assert sorted(numbers) == [0, 1, 2, 3]
        for index, number in enumerate(numbers):
            np.testing.assert_array_equal(read_labels(dataset[index], SIZES[number]), truth(MASKS[number]))
        assert dataset.contents() == {"version": "tiny_streets/1.2.0"}

    @pytest.mark.parametrize(
        ("name", "feature", "classes", "stored", "expected"),
        [
            ("oxford_iiit_pet", "segmentation_mask", 3, [[1, 2, 3]], [[0, 1, 2]]),
        ],
    )
    def test_known_data_sets_whose_classes_start_at_one(self, refuses, name, feature, classes, stored, expected):
        import tensorflow_datasets as tfds

        def source(self, split, decoders=None, **options):
            assert all(isinstance(decoders[name], tfds.decode.SkipDecoding) for name in ("image", feature))
            return [{"image": encoded(0, size=(1, 3)), feature: png(np.uint8(stored)), "label": 3}]

        with tfds.testing.mock_data(as_data_source_fn=source):
            dataset = load_dataset(name, "train", annotation="mask")
        assert (dataset.annotation, dataset.num_classes) == ("mask", classes)
        np.testing.assert_array_equal(read_labels(dataset[0], (1, 3)), expected)
        with refuses(f"the mask has the label {classes + 1}, but the classes have the labels 1 to {classes}"):
            read_labels(dataset[0] | {"mask": png(np.uint8([[classes + 1]]))}, (1, 1))

    def test_every_split_has_the_classes_of_the_first(self, tmp_path, refuses):
        """A split may lack a class, or have a label more."""
        import tensorflow_datasets as tfds

        features = {"image": tfds.features.Image(), "seg": tfds.features.Image(shape=(None, None, 1))}
        stored = {"train": [[0, 1, 2]], "val": [[0, 1]], "test": [[0, 3]]}
        splits = {
            split: [{"image": encoded(0, size=(1, len(mask[0]))), "seg": png(np.uint8(mask))}]
            for split, mask in stored.items()
        }
        prepared(tmp_path, name="tiny_streets", features=features, supervised=None, splits=splits)
        classes = load_dataset("tiny_streets", "train", data_dir=tmp_path).classes
        assert classes == ("0", "1", "2")
        val, test = (
            load_dataset("tiny_streets", split, classes=classes, data_dir=tmp_path) for split in ("val", "test")
        )
        assert val.classes == test.classes == classes
        with refuses("the mask has the label 3, but the classes have the labels 0 to 2"):
            read_labels(test[0], (1, 2))

    def test_masks_of_instances_are_refused_before_they_are_fetched(self, tmp_path, refuses):
        with refuses("scene_parse150 of tensorflow-datasets cannot be used", "masks:ROOT"):
            prepare("scene_parse150", data_dir=tmp_path)

    def test_pets_are_labelled_for_a_classifier(self):
        import tensorflow_datasets as tfds

        def source(self, split, decoders=None, **options):
            return [{"image": encoded(0), "label": 3}]

        with tfds.testing.mock_data(as_data_source_fn=source):
            dataset = load_dataset("oxford_iiit_pet", "train")
        assert (dataset.annotation, dataset.num_classes, dataset[0]["label"]) == ("label", 37, 3)
