"""Data sets with boxes, against parsers that know nothing of tables: a dict for COCO, a regular expression for VOC."""

import io
import json
import pickle
import re

import numpy as np
import pytest
from PIL import ExifTags, Image

from castling_jax.data.annotations import check_size
from castling_jax.data.fingerprint import compare_data, fingerprint
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.prepare import prepare
from castling_jax.data.sources import find_splits, load_dataset
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.detection.transforms import eval_transform
from tests.data.box_files import NAMES, SIZES, coco_content, jpeg, voc_file, write_coco, write_voc
from tests.data.tfds_builders import prepared
from tests.shared_data import unpack

BOX = "it must be four finite numbers [x, y, width, height]"
AREA = "it must be a number from 0 to 3.4e+38"
CLASS_ID = "it must be a whole number from 0 to 2147483647"
PIXELS = "it must be a whole number of pixels from 1 to 2147483647"


def same_boxes(annotations, expected):
    """Compares with rows (x0, y0, x1, y1, class, crowd, area, category id), in their order."""
    columns = [annotations.boxes, annotations.classes, annotations.crowd, annotations.areas, annotations.category_ids]
    found = np.column_stack(columns)
    # float32 holds these coordinates; areas have up to 7 digits.
    np.testing.assert_allclose(found, np.array(expected, np.float64).reshape(-1, 8), rtol=1e-6)
    dtypes = [column.dtype for column in columns]
    assert dtypes == [np.float32, np.int32, bool, np.float32, np.int32]


def changed(content, change):
    """Writes nothing: the content after `change` of its lists."""
    change(content["images"], content["annotations"], content["categories"])
    return content


class TestCoco:
    def test_against_a_plain_parser(self, tmp_path):
        content = coco_content()
        dataset = load_dataset(f"coco:{write_coco(tmp_path, content=content)}", "train2017")
        names = [name for _, name in sorted((entry["id"], entry["name"]) for entry in content["categories"])]
        assert dataset.classes == tuple(names) == ("dog", "cat", "owl")  # by the ids 2, 7, 90
        assert (len(dataset), dataset.num_classes, dataset.dropped, dataset.annotation) == (4, 3, 0, "boxes")
        for index, image in enumerate(content["images"]):
            expected = []
            for one in content["annotations"]:
                if one["image_id"] == image["id"]:
                    x, y, width, height = one["bbox"]
                    (name,) = (entry["name"] for entry in content["categories"] if entry["id"] == one["category_id"])
                    row = x, y, x + width, y + height, names.index(name), one["iscrowd"], one["area"]
                    expected.append((*row, one["category_id"]))
            annotations = dataset.annotations(index)
            same_boxes(annotations, expected)
            assert (annotations.image_id, annotations.size) == (image["id"], SIZES[index])
            example = dataset[np.int64(index)]
            assert example.keys() == {"image", "boxes", "classes", "crowd", "size"}
            assert example["image"] == (tmp_path / "train2017" / image["file_name"]).read_bytes()
            np.testing.assert_array_equal(example["boxes"], annotations.boxes)
            assert example["size"].tolist() == list(SIZES[index])
            assert dataset.describe(index) == f"'{tmp_path}/train2017/{image['file_name']}'"
        assert dataset.box_counts.tolist() == [3, 0, 2, 1]

    def test_boxes_are_clipped_and_those_without_an_area_left_out(self, tmp_path):
        boxes = {
            (-5, -5, 20, 20): (0, 0, 15, 15),
            (70, 50, 100, 100): (70, 50, 80, 60),
            (0, 0, 80, 60): (0, 0, 80, 60),
            (10, 10, 0, 5): None,
            (10, 10, 5, 0): None,
            (10, 10, -5, 5): None,
            (80, 10, 5, 5): None,
            (-9, 10, 9, 5): None,
            (float("nan"), 10, 5, 5): None,
        }

        def change(images, annotations, categories):
            annotations[:] = [{"id": i, "image_id": 100, "category_id": 7, "bbox": box} for i, box in enumerate(boxes)]

        dataset = load_dataset(f"coco:{write_coco(tmp_path, content=changed(coco_content(), change))}", "train2017")
        kept = [box for box in boxes.values() if box]
        # No area is given, so it is that of the clipped box; no iscrowd, so there is no crowd.
        rows = [(*box, 1, 0, (box[2] - box[0]) * (box[3] - box[1]), 7) for box in kept]
        same_boxes(dataset.annotations(0), rows)
        assert dataset.dropped == 6
        assert len(dataset) == 4  # images without a box too
        assert dataset[1]["boxes"].shape == (0, 4)

    def test_numbers_may_be_texts_and_unknown_ones_null(self, tmp_path):
        """A crowd of "0" is none: taken for one, it would hide its box from the training."""

        def change(images, annotations, categories):
            box = {"image_id": 100, "category_id": 7, "bbox": ["1", 2, 3.5, "4"]}
            crowds = ({}, {"iscrowd": "0"}, {"iscrowd": None}, {"iscrowd": False}, {"iscrowd": "1"}, {"iscrowd": True})
            annotations[:] = [box | {"area": None} | crowd for crowd in crowds]

        dataset = load_dataset(f"coco:{write_coco(tmp_path, content=changed(coco_content(), change))}", "train2017")
        same_boxes(dataset.annotations(0), [(1, 2, 4.5, 6, 1, crowd, 14, 7) for crowd in (0, 0, 0, 0, 1, 1)])

    def test_an_image_needs_a_file_name(self, tmp_path, refuses):
        content = coco_content()
        file = write_coco(tmp_path, content=content) / "annotations" / "instances_train2017.json"
        content["images"][0]["file_name"] = None
        file.write_text(json.dumps(content))
        with refuses("the image 100 in", "has the file_name null, and it must be a string that is not empty"):
            load_dataset(f"coco:{tmp_path}", "train2017")

    @pytest.mark.parametrize("name", ["\ud800.jpg", "\x00.jpg"])
    def test_a_name_that_no_file_can_have_is_an_unreadable_image(self, tmp_path, refuses, name):
        content = coco_content()
        file = write_coco(tmp_path, content=content) / "annotations" / "instances_train2017.json"
        content["images"][1]["file_name"] = name
        file.write_text(json.dumps(content))
        dataset = load_dataset(f"coco:{tmp_path}", "train2017")
        assert dataset.contents().keys() == {"file names", "annotations"}
        with refuses("the file cannot be read"):
            dataset[1]

    def test_another_models_classes_are_matched_by_name(self, tmp_path):
        name = f"coco:{write_coco(tmp_path)}"
        own, given = (
            load_dataset(name, "train2017"),
            load_dataset(name, "train2017", classes=["owl", "bee", "dog", "cat"]),
        )
        assert given.classes == ("owl", "bee", "dog", "cat")
        assert given.category_ids.tolist() == [90, -1, 2, 7]
        for index in range(len(own)):
            before, after = own.annotations(index), given.annotations(index)
            assert [own.classes[i] for i in before.classes] == [given.classes[i] for i in after.classes]
            np.testing.assert_array_equal(before.category_ids, after.category_ids)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda i, a, c: a[0].update(id=77, category_id=3),
                ("the annotation 77 in", "category_id 3", "file lists"),
            ),
            (lambda i, a, c: a[0].update(id=77, category_id=[7]), ("annotation 77", "category_id [7]", "file lists")),
            (lambda i, a, c: a[1].update(image_id=1), ("has the image_id 1, and it must be one that the file lists",)),
            (lambda i, a, c: a[0].pop("image_id"), ("has no image_id: it must be one that the file lists",)),
            (lambda i, a, c: a[0].update(id=77, bbox=[1, 2, 3]), ("annotation 77 in", "bbox [1, 2, 3]", BOX)),
            (lambda i, a, c: a[0].update(id=77, bbox="1234"), ("annotation 77 in", 'bbox "1234"', BOX)),
            (lambda i, a, c: a[0].update(id=77, bbox=["left", 1, 2, 3]), ("annotation 77", 'bbox ["left"', BOX)),
            (lambda i, a, c: a[0].update(id=77, bbox=[1, 2, None, 3]), ("annotation 77", "[1, 2, null, 3]", BOX)),
            (lambda i, a, c: a[0].update(id=77, bbox=None), ("annotation 77", "bbox null", BOX)),
            (
                lambda i, a, c: a[0].update(id=77, bbox=[1, 2, 3, 10**400]),
                ("annotation 77", "bbox [1, 2, 3, 1000", BOX),
            ),
            (lambda i, a, c: a[0].update(id=77, bbox=[1, 2, 3, float("inf")]), ("annotation 77", "Infinity]", BOX)),
            (lambda i, a, c: (a[0].update(id=77), a[0].pop("bbox")), ("the annotation 77", f"has no bbox: {BOX}")),
            (lambda i, a, c: (a[1].pop("id"), a[1].pop("bbox")), ("the annotation number 2 in",)),
            (lambda i, a, c: a[0].update(id=77, iscrowd="no"), ("annotation 77", 'iscrowd "no"', "must be 0 or 1")),
            (lambda i, a, c: a[0].update(id=77, iscrowd=2), ("annotation 77", "iscrowd 2", "must be 0 or 1")),
            (lambda i, a, c: a[0].update(id=77, area="large"), ("annotation 77", 'area "large"', AREA)),
            (lambda i, a, c: a[0].update(id=77, area=-1), ("annotation 77", "area -1", AREA)),
            (lambda i, a, c: a[0].update(id=77, area=float("inf")), ("annotation 77", "area Infinity", AREA)),
            (lambda i, a, c: a[0].update(id=77, area=1e39), ("annotation 77", "area 1e+39", AREA)),
            (
                lambda i, a, c: a.insert(0, None),
                ("is damaged: number 1 of its annotations must be an object, not null",),
            ),
            (lambda i, a, c: c[0].update(name="dog"), ("the same name, 'dog': those with the ids 2 and 7",)),
            (lambda i, a, c: c[0].update(name=None), ("the category 7 in", "name null", "a string that is not empty")),
            (lambda i, a, c: c[0].update(name=" "), ("the category 7 in", 'name " "', "a string that is not empty")),
            (lambda i, a, c: c[0].pop("name"), ("the category 7 in", "has no name: it must be a string")),
            (
                lambda i, a, c: c[0].update(id="7"),
                ("the category number 1 in", 'id "7"', CLASS_ID),
            ),
            (lambda i, a, c: c[0].update(id=2**31), ("the id 2147483648", CLASS_ID)),
            (lambda i, a, c: c.append(c[0]), ("two categories", "have the same id, 7")),
            (lambda i, a, c: i.append(i[0]), ("two images", "have the same id, 100")),
            (
                lambda i, a, c: i[0].pop("id"),
                ("the image number 1 in", "has no id: it must be a whole number or a string"),
            ),
            (lambda i, a, c: (i.clear(), a.clear()), ("the split 'train2017'", "holds no images")),
            (lambda i, a, c: (a.clear(), c.clear()), ("train2017' name no class",)),
            (lambda i, a, c: i[0].update(width=None), ("the image 100 in", "width null", PIXELS)),
            (lambda i, a, c: i[0].update(height=[480]), ("the image 100 in", "height [480]", PIXELS)),
            (lambda i, a, c: i[0].update(height="tall"), ("the image 100 in", 'height "tall"', PIXELS)),
            (lambda i, a, c: i[0].update(height=0), ("the image 100 in", "height 0", PIXELS)),
            (lambda i, a, c: i[0].update(height=-5), ("the image 100 in", "height -5", PIXELS)),
            (lambda i, a, c: i[0].update(width=10**12), ("the image 100 in", "width 1000000000000", PIXELS)),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, refuses, change, said):
        write_coco(tmp_path, content=changed(coco_content(), change))
        with refuses(*said):
            load_dataset(f"coco:{tmp_path}", "train2017")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            *(("", ""), ("{", ""), ("[" * 100_000, ""), ("\x00", "")),
            ("[]", ": it must hold an object, not []"),
            ("null", ": it must hold an object, not null"),
            ("{}", ": its annotations must be a list of objects, not missing"),
            ('{"annotations": [], "images": null}', ": its images must be a list of objects, not null"),
            ('{"annotations": [], "images": 3}', ": its images must be a list of objects, not 3"),
        ],
    )
    def test_damaged_json_is_refused(self, tmp_path, refuses, text, said):
        file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
        file.write_text(text)
        with refuses(f"'{file}' is damaged{said}"):
            load_dataset(f"coco:{tmp_path}", "train2017")

    def test_what_is_missing_is_named(self, tmp_path, refuses):
        with refuses(f"there is no folder '{tmp_path}/annotations'"):
            load_dataset(f"coco:{tmp_path}", "train")
        write_coco(tmp_path)
        with refuses("unknown split", "'train'", "train2017"):
            load_dataset(f"coco:{tmp_path}", "train")
        with refuses("category 'dog'", "which the model does not have"):
            load_dataset(f"coco:{tmp_path}", "train2017", classes=["cat", "owl"])
        with refuses("must not be empty"):
            load_dataset("coco:", "train")

    def test_splits(self, tmp_path):
        write_coco(tmp_path)
        name = f"coco:{tmp_path}"
        # Four images; a tenth of them is one at least.
        assert find_splits(name) == ("train2017 without 10%", "10% of train2017")
        rest, held_out = (load_dataset(name, split) for split in find_splits(name))
        whole = load_dataset(name, "train2017")
        assert (len(rest), len(held_out)) == (3, 1)
        together = {data.image_ids[i]: data.annotations(i) for data in (rest, held_out) for i in range(len(data))}
        for index in range(len(whole)):
            np.testing.assert_array_equal(together[whole.image_ids[index]].boxes, whole.annotations(index).boxes)
        write_coco(tmp_path, "val2017")
        assert find_splits(name) == ("train2017", "val2017")


class TestVoc:
    def test_against_a_regular_expression(self, tmp_path):
        dataset = load_dataset(f"voc:{write_voc(tmp_path)}", "train")
        assert dataset.classes == tuple(sorted(dataset.classes))
        assert set(dataset.classes) <= set(NAMES)
        assert len(dataset) == 3
        for index, number in enumerate((0, 2, 3)):
            text = (tmp_path / "Annotations" / f"image {number}.xml").read_text()
            pattern = (
                r"<name>(\w+)</name><pose>.*?<difficult>(\d)<.*?xmin>(\d+)<.*?ymin>(\d+)<.*?xmax>(\d+)<.*?ymax>(\d+)<"
            )
            expected = []
            for name, difficult, *corners in re.findall(pattern, text, re.DOTALL):
                x0, y0, x1, y1 = map(int, corners)
                label = dataset.classes.index(name)
                expected.append((x0, y0, x1, y1, label, int(difficult), (x1 - x0) * (y1 - y0), label + 1))
            assert len(expected) == number
            annotations = dataset.annotations(index)
            same_boxes(annotations, expected)
            assert (annotations.image_id, annotations.size) == (f"image {number}", SIZES[number])
            assert dataset[index]["image"] == (tmp_path / "JPEGImages" / f"image {number}.jpg").read_bytes()

    def test_classes_are_of_all_files_or_are_given(self, tmp_path, refuses):
        write_voc(tmp_path)
        (tmp_path / "Annotations" / "image 1.xml").write_text(voc_file(SIZES[1], [("ant", 0, 1, 1, 9, 9)]))
        (tmp_path / "Annotations" / "image 3.xml").write_text(voc_file(SIZES[3], [("bee", 0, 1, 1, 9, 9)]))
        (tmp_path / "Annotations" / "image 2.xml").write_text(voc_file(SIZES[2], []))
        name = f"voc:{tmp_path}"
        for split in ("train", "val"):
            assert load_dataset(name, split).classes == ("ant", "bee")
        given = load_dataset(name, "val", classes=["bee", "cow", "ant"])
        assert given.annotations(0).classes.tolist() == [2]
        with refuses("'image 1.xml'", "has the class 'ant', which the model does not have"):
            load_dataset(name, "val", classes=["bee"])

    def test_images_of_other_kinds(self, tmp_path):
        write_voc(tmp_path)
        image = tmp_path / "JPEGImages" / "image 1.jpg"
        image.rename(image.with_suffix(".PNG"))
        assert load_dataset(f"voc:{tmp_path}", "val").files == ("image 1.PNG",)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "no element found"),
            ("<annotation><size>", "no element found"),
            ('<?xml version="1.0" encoding="none"?><annotation/>', "unknown encoding"),
            ("<annotation/>", "it has no size/height"),
            (voc_file((5, 5), [("cat", 0, 1, 2, 3, "x")]), "its bndbox/ymax is 'x', not a finite number"),
            (voc_file((5, 5), [("cat", 0, 1, 2, 3, "inf")]), "its bndbox/ymax is 'inf', not a finite number"),
            (voc_file((5, 5), [("", 0, 1, 2, 3, 4)]), "it has no name"),
            (voc_file((5, 5), [("cat", "true", 1, 2, 3, 4)]), "an object's difficult is 'true', not 0 or 1"),
            (voc_file((5, "wide"), []), "its size/width is 'wide', not a finite number"),
            (voc_file((5, 10**12), []), "its width is 1e+12, not a whole number of pixels from 1 to 2147483647"),
            (voc_file((0, 5), []), "its height is 0, not a whole number of pixels"),
            (voc_file((5, -3), []), "its width is -3, not a whole number of pixels"),
        ],
    )
    def test_damaged_xml_is_refused(self, tmp_path, refuses, text, said):
        file = write_voc(tmp_path) / "Annotations" / "image 3.xml"
        file.write_text(text)
        with refuses(f"'{file}' is missing or damaged", said):
            load_dataset(f"voc:{tmp_path}", "train")

    def test_what_is_missing_is_named(self, tmp_path, refuses):
        with refuses(f"there is no folder '{tmp_path}/ImageSets/Main'"):
            load_dataset(f"voc:{tmp_path}", "train")
        write_voc(tmp_path, {"train": (0, 3), "none": ()})
        with refuses("unknown split", "'tran'", "did you mean 'train'"):
            load_dataset(f"voc:{tmp_path}", "tran")
        with refuses("train.txt' lists 'image 0' 2 times, and it may list a name once."):
            load_dataset(f"voc:{write_voc(tmp_path / 'twice', {'train': (0, 3, 0)})}", "train")
        with refuses("the split 'none'", "holds no images"):
            load_dataset(f"voc:{tmp_path}", "none")
        assert find_splits(f"voc:{tmp_path}") == ("train without 10%", "10% of train")
        for number in range(4):
            (tmp_path / "Annotations" / f"image {number}.xml").write_text(voc_file(SIZES[number], []))
        with refuses(f"the annotations of '{tmp_path}/JPEGImages' name no class"):
            load_dataset(f"voc:{tmp_path}", "train")
        (tmp_path / "Annotations" / "image 3.xml").unlink()
        with refuses("train.txt' has the line 'image 3', but", "Annotations' has no file of this name with .xml"):
            load_dataset(f"voc:{tmp_path}", "train")
        (tmp_path / "JPEGImages").rename(tmp_path / "images")
        with refuses(f"'{tmp_path}' needs the folders Annotations and JPEGImages"):
            load_dataset(f"voc:{tmp_path}", "train")

    @pytest.mark.parametrize("line", ["image 0 1", "image 0.jpg", "JPEGImages/image 0", "../Annotations/image 0"])
    def test_a_line_that_is_no_bare_name_is_named(self, tmp_path, refuses, line):
        write_voc(tmp_path)
        file = tmp_path / "ImageSets" / "Main" / "train.txt"
        file.write_text(f"image 2\n{line}\n")
        with refuses(f"'{file}' has the line {line!r}", "a line must be the bare name of one image, without a folder"):
            load_dataset(f"voc:{tmp_path}", "train")

    def test_small_files_in_a_bucket_are_read_side_by_side(self, tmp_path, monkeypatch):
        write_voc(tmp_path)
        expected = load_dataset(f"voc:{tmp_path}", "train")
        monkeypatch.setattr("castling_jax.data.annotations.is_remote", lambda path: True)
        found = load_dataset(f"voc:{tmp_path}", "train")
        assert found.contents() == expected.contents()


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_unreadable_images_are_skipped_counted_and_named(kind, tmp_path, caplog):
    """One is gone, one is of another size than its annotations say, one is damaged; the fourth remains."""
    write = {"coco": write_coco, "voc": write_voc}[kind]
    write(tmp_path, **({"splits": {"train2017": range(4)}} if kind == "voc" else {}))
    dataset = load_dataset(f"{kind}:{tmp_path}", "train2017")
    paths = [dataset.folder / file for file in dataset.files]
    paths[0].unlink()
    paths[1].write_bytes(jpeg((99, 98)))
    paths[2].write_bytes(b"no image")
    transform = eval_transform(Preprocessing(32))
    (batch,) = evaluation_batches(dataset, batch_size=4, transform=transform, max_corrupt_share=0.01)
    assert batch["weight"].tolist() == [0, 0, 0, 1]
    for path, said in zip(
        paths,
        ("cannot be read (No such file", "98 x 99 pixels, but its annotations say 40 x 50", "cannot be decoded"),
        strict=False,
    ):
        assert any(f"'{path}'" in message and said in message for message in caplog.messages), caplog.messages


def test_a_data_set_without_any_of_its_images_is_refused(tmp_path, refuses):
    content = coco_content()
    file = write_coco(tmp_path, "train", content=content) / "annotations" / "instances_train.json"
    for image in content["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    file.write_text(json.dumps(content))
    with refuses(
        f"none of the first 4 images of the annotations is in '{tmp_path}/train'", "'train/000.jpg'", "ROOT/S"
    ):
        load_dataset(f"coco:{tmp_path}", "train")
    for image in write_voc(tmp_path / "voc").glob("JPEGImages/*"):
        image.rename(image.parent.parent / image.name)
    with refuses(
        "none of the first 3 images", "JPEGImages', such as 'image 0.jpg'", "the name of its line in the list"
    ):
        load_dataset(f"voc:{tmp_path / 'voc'}", "train")


def test_a_turned_photograph_needs_dataset_exif(refuses):
    """Annotations of the upright image: with the pixels as they are stored, every box would be wrong."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 60)).save(file, "JPEG", exif=exif)
    example = {"image": file.getvalue(), "size": np.array([80, 60])}
    assert eval_transform(Preprocessing(32, exif=True))(example)["size"].tolist() == [80, 60]
    with refuses("the image has 80 x 60 pixels, but its annotations say 60 x 80: config.dataset.exif may turn it"):
        eval_transform(Preprocessing(32))(example)
    check_size((3, 4), {})  # an image of nobody's data set


def test_a_change_of_the_annotations_is_noticed(tmp_path, refuses):
    name = f"coco:{write_coco(tmp_path)}"
    before = load_dataset(name, "train2017")
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))
    now = load_dataset(name, "train2017")
    kept = fingerprint(before, before)
    assert (kept["classes"], kept["category_ids"]) == (["dog", "cat", "owl"], [2, 7, 90])
    assert compare_data(kept, fingerprint(before, before), accept_changes=False) == ""
    with refuses("the training split has other annotations"):
        compare_data(kept, fingerprint(now, before), accept_changes=False)


def test_workers_take_a_copy(tmp_path):
    dataset = load_dataset(f"coco:{write_coco(tmp_path)}", "train2017")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.contents() == dataset.contents()
    np.testing.assert_array_equal(copy[3]["boxes"], dataset[3]["boxes"])


def test_prepare_counts_boxes(tmp_path):
    write_voc(tmp_path)
    said = prepare(f"voc:{tmp_path}")
    assert "train: 3 images, 5 boxes, at most 3 in an image; 0 boxes without an area" in said
    assert "val: 1 images, 1 boxes" in said


class TestTfds:
    """Data sets with the features of TFDS's coco and voc."""

    @pytest.fixture(scope="class")
    @classmethod
    def coco_dir(cls, tmp_path_factory):
        import tensorflow_datasets as tfds

        folder = tmp_path_factory.mktemp("tfds")
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=NAMES),
                    "is_crowd": np.bool_,
                }
            ),
        }
        examples = [
            {
                "image": jpeg(size, number),
                "image/filename": f"{number}.jpg",
                "image/id": 50 + number,
                "objects": [cls.coco_object(tfds, k) for k in range(number)],
            }
            for number, size in enumerate(SIZES)
        ]
        prepared(folder, name="tiny_coco", features=features, supervised=None, splits={"train": examples})
        return folder

    @staticmethod
    def coco_object(tfds, number):
        box = tfds.features.BBox(ymin=0.1 * number, xmin=0.2, ymax=0.1 * number + 0.5, xmax=0.7 + 0.1 * number)
        return {"id": number, "area": 10 + number, "bbox": box, "label": number % 3, "is_crowd": number == 2}

    def test_coco(self, coco_dir):
        dataset = load_dataset("tiny_coco", "train", data_dir=coco_dir)
        assert (dataset.annotation, dataset.classes, len(dataset)) == ("boxes", NAMES, 4)
        seen = []
        for index in range(4):
            annotations, example = dataset.annotations(index), dataset[index]
            number = annotations.image_id - 50
            height, width = SIZES[number]
            rows = [
                (0.2 * width, 0.1 * k * height, (0.7 + 0.1 * k) * width, (0.1 * k + 0.5) * height, k, k == 2, 10 + k, k)
                for k in range(number)
            ]
            same_boxes(annotations, rows)
            assert annotations.size == SIZES[number]
            assert example["image"] == jpeg(SIZES[number], number)
            np.testing.assert_array_equal(example["boxes"], annotations.boxes)
            assert dataset.describe(index) == f"tiny_coco train {index} '{number}.jpg'"
            seen.append(number)
        assert sorted(seen) == [0, 1, 2, 3]
        assert len(pickle.loads(pickle.dumps(dataset))) == 4

    def test_cocos_own_builder_needs_tensorflow_and_its_files_do_not(self, coco_dir, tmp_path, refuses):
        with refuses("preparing coco/2017 needs a package that is not installed (No module named 'tensorflow')"):
            load_dataset("coco/2017", "train", data_dir=tmp_path)
        (version,) = (coco_dir / "tiny_coco").iterdir()
        here = tmp_path / "coco" / "2017" / "1.1.0"
        here.mkdir(parents=True)
        for file in version.iterdir():
            text = file.read_bytes()
            if file.suffix == ".json":
                text = text.replace(b"tiny_coco", b"coco").replace(b"1.2.0", b"1.1.0")
                if file.name == "dataset_info.json":
                    text = json.dumps(json.loads(text) | {"configName": "2017"}).encode()
            (here / file.name.replace("tiny_coco", "coco")).write_bytes(text)
        dataset = load_dataset("coco/2017", "train", data_dir=tmp_path)
        assert [len(dataset[i]["boxes"]) for i in range(4)] != [0, 0, 0, 0]
        assert find_splits("coco/2017", data_dir=tmp_path) == ("train[:90%]", "train[90%:]")

    def test_voc(self):
        import tensorflow_datasets as tfds

        def source(self, split, decoders=None, **options):
            assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
            objects = {
                "bbox": np.float32([[0.5, 0.25, 1, 0.5], [0.5, 0.5, 0.5, 1]]),
                "label": np.array([19, 3]),
                "is_difficult": np.array([True, False]),
            }
            return [{"image": jpeg((60, 80)), "image/filename": b"000005.jpg", "objects": objects}]

        with tfds.testing.mock_data(as_data_source_fn=source):
            dataset = load_dataset("voc/2007", "train")
        assert dataset.num_classes == 20
        assert dataset.classes[14] == "person"
        # Difficult objects are crowds; the second box has no height.
        same_boxes(dataset.annotations(0), [(20, 30, 40, 60, 19, True, 600, 19)])
        assert dataset.describe(0) == "voc/2007 train 0 '000005.jpg'"


class TestRealData:
    def test_bccd(self, tmp_path):
        name = f"voc:{unpack('bccd.tar', tmp_path)}/BCCD"
        splits = [load_dataset(name, split) for split in ("train", "val", "test")]
        assert [len(split) for split in splits] == [205, 87, 72]
        assert find_splits(name) == ("train", "val")
        counts = sum(np.bincount(split.columns["classes"], minlength=3) for split in splits)
        assert dict(zip(splits[0].classes, counts.tolist(), strict=True)) == {"Platelets": 361, "RBC": 4153, "WBC": 372}
        # Two have no width; the counts above are without them.
        assert [split.dropped for split in splits] == [1, 1, 0]
        texts = [path.read_text() for path in (tmp_path / "BCCD" / "Annotations").glob("*.xml")]
        assert sum(text.count("<object>") for text in texts) == counts.sum() + 2
        assert splits[0][0]["size"].tolist() == [480, 640]

    def test_coco128(self, tmp_path):
        """YOLO's text files, (class, centre, size) as shares, against the same boxes in COCO's JSON."""
        root = unpack("coco128.tar", tmp_path) / "coco128"
        images, annotations = [], []
        labels = sorted((root / "object_detection" / "labels" / "val2017").glob("*.txt"))
        (root / "annotations").mkdir()
        (root / "images" / "val2017").rename(root / "val2017")
        expected = {}
        for path in labels:
            with Image.open(root / "val2017" / f"{path.stem}.jpg") as image:
                width, height = image.size
            images.append({"id": int(path.stem), "file_name": f"{path.stem}.jpg", "height": height, "width": width})
            rows = np.array([list(map(float, line.split())) for line in path.read_text().splitlines()]).reshape(-1, 5)
            centers, sides = rows[:, 1:3] * [width, height], rows[:, 3:] * [width, height]
            expected[int(path.stem)] = np.concatenate([centers - sides / 2, centers + sides / 2, rows[:, :1]], 1)
            for (label, *_), corner, side in zip(rows, centers - sides / 2, sides, strict=True):
                box = {"image_id": int(path.stem), "category_id": int(label), "bbox": [*corner, *side]}
                annotations.append(box | {"id": len(annotations)})
        categories = [{"id": number, "name": f"class {number}"} for number in range(80)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
        dataset = load_dataset(f"coco:{root}", "val2017")
        assert len(dataset) == len(labels) > 100
        for index in range(len(dataset)):
            annotation = dataset.annotations(index)
            found = np.column_stack([annotation.boxes, annotation.classes])
            # YOLO's shares have six digits, so that boxes at the border may lie 1e-6 of 640 pixels outside.
            np.testing.assert_allclose(found, expected[annotation.image_id], atol=2e-3)
        transform = eval_transform(Preprocessing(64))
        batches = list(evaluation_batches(dataset, batch_size=32, transform=transform))
        assert sum(batch["weight"].sum() for batch in batches) == len(dataset)
