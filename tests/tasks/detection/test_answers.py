"""COCO's figures beside pycocotools', which computes them from the annotations' file and from detections.json."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from castling_jax import plots
from castling_jax.data.coco import coco
from castling_jax.data.voc import voc
from castling_jax.plots import draw_detections
from castling_jax.tasks.detection.answers import Answered, BoxAnswers
from castling_jax.tasks.task import FORMS
from tests.conftest import GOLDEN
from tests.data.box_files import SIZES, coco_content, jpeg, write_coco, write_voc

# In pycocotools' order.
FIGURES = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
FIGURES += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
CASES = {case["name"]: case for case in json.loads((GOLDEN / "dense" / "coco_ap.json").read_text())["cases"]}


def dataset_of(truth, root):
    """The data set of a file of COCO's; one image has to be there, and none is read before it is drawn."""
    named = [image | {"file_name": f"{image['id']}.jpg"} for image in truth["images"]]
    for folder in ("annotations", "val"):
        (root / folder).mkdir(parents=True)
    (root / "val" / named[0]["file_name"]).touch()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(truth | {"images": named}))
    return coco(root, "val")


def answered(dataset, detections):
    """COCO's results as the arrays of an evaluation: best first, and rows without a detection have the class -1."""
    of_image = [[d for d in detections if d["image_id"] == image_id] for image_id in dataset.image_ids]
    shape = (len(of_image), max(1, *map(len, of_image)))
    boxes, scores = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
    classes = np.full(shape, -1, np.int32)
    for image, found in enumerate(of_image):
        for row, one in enumerate(sorted(found, key=lambda detection: -detection["score"])):
            x, y, width, height = one["bbox"]
            boxes[image, row], scores[image, row] = (x, y, x + width, y + height), one["score"]
            classes[image, row] = dataset.category_ids.tolist().index(one["category_id"])
    return Answered(boxes, scores, classes)


def box_answers(dataset, train_form, inference_form=None, **changes):
    fields = {
        "image": np.arange(len(dataset)),
        "difference": np.zeros(len(dataset), np.float32),
        "corrupt": 0,
        "exif": False,
    }
    return BoxAnswers(dataset, train_form=train_form, inference_form=inference_form or train_form, **(fields | changes))


def pycocotools(truth, detections):
    """The 12 figures, and the average precision of each class by its id; -1 where there is no such object."""
    truth = json.loads(json.dumps(truth | {"info": {}, "licenses": []}))  # pycocotools writes into its arguments
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(json.loads(json.dumps(detections))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]
    return evaluation.stats, dict(zip(evaluation.params.catIds, precision.mean((0, 1)).tolist(), strict=True))


def assert_figures(figures, form, expected):
    """Figures are equal up to the order of sums over a thousand numbers, and those of no object are left out."""
    found = {name: figures[f"{name}_{form}"] for name in FIGURES if f"{name}_{form}" in figures}
    wanted = {name: value for name, value in zip(FIGURES, expected, strict=True) if value != -1}
    assert found == pytest.approx(wanted, abs=1e-12)


def written(found, dataset):
    """What detections.json says; pictures are not rendered, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: b"")
        return json.loads(found.files(dataset.classes)["detections.json"])


def draw(seed):
    """A file of COCO's and detections, in whole pixels: equal scores, and IoUs that are equal to a threshold.

    Images are not in the order of their ids. Image 1 has no objects, image 2 no detections, image 3 more than 100; the
    last class has no objects; some objects are small, and some are crowds.
    """
    rng = np.random.default_rng(seed)
    image_ids, categories, side = rng.permutation(500)[:6].tolist(), [7, 2, 90, 41], 160

    def random_box():
        sides = 4 * rng.integers(1, rng.choice([8, 30]), 2)
        return [*(4 * rng.integers((side - sides) // 4 + 1)), *sides]

    annotations, detections = [], []
    for number, image_id in enumerate(image_ids):
        objects = [(random_box(), rng.choice(categories[:3])) for _ in range(0 if number == 1 else rng.integers(2, 9))]
        for box, category in objects:
            one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            annotations.append(one | {"area": box[2] * box[3] / rng.integers(1, 3), "iscrowd": rng.integers(5) == 0})
        for _ in range({2: 0, 3: 130}.get(number, 15)):
            box, category = random_box(), rng.choice(categories)
            if objects and rng.random() < 0.7:  # an object's, moved at its right and lower sides
                near, category = objects[rng.integers(len(objects))]
                box = [*near[:2], *np.clip(near[2:] + 4 * rng.integers(-2, 3, 2), 4, side - np.array(near[:2]))]
            one = {"image_id": image_id, "category_id": category, "bbox": box, "score": rng.integers(1, 9) / 8}
            detections.append(one)
    images = [{"id": image_id, "height": side, "width": side} for image_id in image_ids]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in categories],
    }
    return json.loads(json.dumps([content, detections], default=lambda number: number.item()))


@pytest.mark.parametrize("name", CASES)
def test_figures_are_the_golden_ones(name, tmp_path):
    case = CASES[name]
    dataset = dataset_of(case["truth"], tmp_path)
    found = box_answers(dataset, answered(dataset, case["detections"]))
    for form in FORMS:
        assert_figures(found.figures(), form, case["stats"])
    by_class = [row["mAP"] for row in found.by_class(dataset.classes).values()]
    expected = [None if share == -1 else pytest.approx(share, abs=1e-12) for share in case["ap_per_class"].values()]
    assert by_class == expected
    np.testing.assert_allclose(
        pycocotools(case["truth"], written(found, dataset))[0], case["stats"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40))])
def test_figures_are_those_of_pycocotools(seed, tmp_path):
    truth, detections = draw(seed)
    dataset = dataset_of(truth, tmp_path)
    forms = {"train_form": detections[::2], "inference_form": detections}
    found = box_answers(dataset, **{form: answered(dataset, part) for form, part in forms.items()})
    for form, part in forms.items():
        assert_figures(found.figures(), form, pycocotools(truth, part)[0])
    results = written(found, dataset)
    assert len(results) == len(detections)
    stats, shares = pycocotools(truth, results)
    assert_figures(found.figures(), "inference_form", stats)
    for category, (name, row) in zip(sorted(shares), found.by_class(dataset.classes).items(), strict=True):
        mine = [one for one in truth["annotations"] if one["category_id"] == category and not one["iscrowd"]]
        assert name == f"class {category}"
        assert (row["boxes"], row["images"]) == (len(mine), len({one["image_id"] for one in mine}))
        assert row["mAP"] == (pytest.approx(shares[category], abs=1e-12) if mine else None)


def test_scores_and_boxes_are_written_as_they_were_compared(tmp_path):
    """Scores that differ in their last bit alone: rounded, the wrong detection would come first."""
    annotation = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    truth = {
        "images": [{"id": 5, "height": 100, "width": 100}],
        "annotations": [annotation],
        "categories": [{"id": 3, "name": "owl"}],
    }
    dataset = dataset_of(truth, tmp_path)
    wrong, right = np.float32([[60, 60, 90.1, 90.3], [10, 10.1, 50, 50]])
    scores = np.array([[np.nextafter(np.float32(0.7), np.float32(1)), 0.7]], np.float32)
    found = box_answers(dataset, Answered(np.stack([wrong, right])[None], scores, np.zeros((1, 2), np.int32)))
    results = written(found, dataset)
    assert [one["score"] for one in results] == scores[0].tolist()
    stats, _ = pycocotools(truth, results[::-1])
    assert_figures(found.figures(), "inference_form", stats)
    assert found.figures()["AP50_inference_form"] == pytest.approx(0.5)


def test_counts_and_differences(tmp_path):
    """Of four images the third is corrupt, with the only objects of its class."""
    dataset = coco(write_coco(tmp_path, "val", coco_content(counts=(3, 2, 2, 1))), "val")
    kept = np.array([0, 1, 3])
    nothing = Answered(np.zeros((3, 2, 4), np.float32), np.zeros((3, 2), np.float32), np.full((3, 2), -1, np.int32))
    found = box_answers(dataset, nothing, image=kept, difference=np.float32([0.5, 0.125, 0.25]), corrupt=1)
    figures = found.figures()
    assert (figures["eval_images"], figures["eval_corrupt"], figures["max_difference"]) == (3, 1, 0.5)
    assert {figures[f"mAP_{form}"] for form in FORMS} == {0}
    objects = [one for index in kept for one in dataset.annotations(index).classes[~dataset.annotations(index).crowd]]
    assert [row["boxes"] for row in found.by_class(dataset.classes).values()] == [objects.count(n) for n in range(3)]
    files = found.files(dataset.classes)
    assert json.loads(files["detections.json"]) == []
    header, *rows = csv.reader(io.StringIO(files["classes.csv"].decode()))
    assert header == ["class", "images", "boxes", "mAP"]
    assert rows == [
        [name, *("" if x is None else str(x) for x in row.values())]
        for name, row in found.by_class(dataset.classes).items()
    ]


def test_a_split_without_objects_is_refused(tmp_path, refuses):
    content = coco_content()
    for one in content["annotations"]:
        one["iscrowd"] = 1
    for number, annotations in enumerate((content["annotations"], [])):
        dataset = dataset_of(content | {"annotations": annotations}, tmp_path / str(number))
        found = box_answers(dataset, answered(dataset, []))
        for compute in (
            found.figures,
            lambda found=found: found.by_class("abc"),
            lambda found=found: found.files("abc"),
        ):
            with refuses("none of the 4 images has an object that is no crowd: choose another split."):
                compute()


def test_images_of_pascal_voc_have_names(tmp_path):
    dataset = voc(write_voc(tmp_path, {"val": (3, 1, 2)}), "val")
    truth = [dataset.annotations(index) for index in range(3)]
    rows = max(len(one.boxes) for one in truth)
    found = Answered(
        np.zeros((3, rows, 4), np.float32), np.zeros((3, rows), np.float32), np.full((3, rows), -1, np.int32)
    )
    for index, one in enumerate(truth):
        count = len(one.boxes)
        found.boxes[index, :count], found.classes[index, :count] = one.boxes, one.classes
        found.scores[index, :count] = np.linspace(0.9, 0.4, count, dtype=np.float32)
    found = box_answers(dataset, found)
    assert found.figures()["mAP_train_form"] == 1
    results = written(found, dataset)
    assert [one["image_id"] for one in results] == ["image 3"] * 3 + ["image 1"] + ["image 2"] * 2
    for one, (x0, y0, x1, y1), number in zip(
        results,
        np.concatenate([one.boxes for one in truth]).tolist(),
        np.concatenate([one.classes for one in truth]),
        strict=True,
    ):
        assert one["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert one["category_id"] == number + 1


@pytest.fixture
def drawn(monkeypatch):
    """The pictures that an evaluation draws, as (image, truth, detections)."""
    pictures = []

    def keep(shown):
        pictures.extend(shown)
        return draw_detections(shown)

    monkeypatch.setattr(plots, "draw_detections", keep)
    return pictures


def test_pictures_show_the_first_images_with_true_boxes_and_sure_detections(tmp_path, drawn):
    dataset = coco(write_coco(tmp_path, "val"), "val")
    (tmp_path / "val" / "002.jpg").write_bytes(b"no image any more")
    scores = np.tile(np.float32([0.9, 0.3, 0.2]), (4, 1))
    boxes = np.tile(np.float32([2, 3, 22, 23]), (4, 3, 1))
    found = box_answers(dataset, Answered(boxes, scores, np.tile(np.int32([2, 0, 1]), (4, 1))))
    files = found.files(dataset.classes)
    assert files.keys() == {"detections.json", "classes.csv", "precision_recall.png", "detections.png"}
    for name in ("precision_recall.png", "detections.png"):
        assert min(Image.open(io.BytesIO(files[name])).size) > 300
    assert [image.shape[:2] for image, _, _ in drawn] == [SIZES[0], SIZES[1], SIZES[3]]
    for (_, truth, detected), index in zip(drawn, (0, 1, 3), strict=True):
        annotations = dataset.annotations(index)
        np.testing.assert_array_equal(truth[0], annotations.boxes)
        assert truth[1:] == ([dataset.classes[number] for number in annotations.classes], None)
        assert detected[1] == [dataset.classes[2], dataset.classes[0]]
        np.testing.assert_array_equal(detected[2], scores[0, :2])


@pytest.mark.parametrize("exif", [False, True])
def test_pictures_are_turned_as_the_boxes_are(tmp_path, drawn, exif):
    """Upside down: a size does not tell whether the image was turned."""
    dataset = coco(write_coco(tmp_path, "val"), "val")
    encoded = jpeg(SIZES[0])
    upright = Image.open(io.BytesIO(encoded))
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 3
    upright.save(tmp_path / "val" / "000.jpg", "JPEG", exif=turn, quality=95)
    stored = np.asarray(Image.open(tmp_path / "val" / "000.jpg"))
    found = box_answers(dataset, answered(dataset, []), exif=exif)
    found.files(dataset.classes)
    np.testing.assert_array_equal(drawn[0][0], stored[::-1, ::-1] if exif else stored)
