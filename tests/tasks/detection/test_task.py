"""Detection as a task: the golden losses through the step's arithmetic, answers in the images' own pixels, refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from castling_jax.data.coco import coco
from castling_jax.data.sources import Unread
from castling_jax.models.registry import abstract_model
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.detection.task import Detection
from castling_jax.tasks.registry import check_dataset
from castling_jax.tasks.task import FORMS, Teacher
from castling_jax.training.config import default_config
from castling_jax.training.evaluate import make_evaluator
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import make_mesh
from tests.conftest import Golden
from tests.data.box_files import SIZES, coco_content, write_coco
from tests.models.small import random_variables, small_model
from tests.tasks.detection.test_answers import FIGURES, pycocotools, written

TAL_STEP = 7
SUFFIX = {"atss": "/atss", "tal": "/tal", "simota": ""}
REFERENCE_NAMES = {"varifocal": "vfl", "giou": "box", "dfl": "dfl"}


def task(**changes):
    fields = {
        "num_classes": 5,
        "legacy": False,
        "tal_step": TAL_STEP,
        "max_boxes": 6,
        "suppression": Suppression(max_detections=20),
        "exif": False,
    }
    return Detection(**(fields | changes))


@functools.cache
def golden_file(assigner):
    return Golden("dense/picodet_legacy" if assigner == "simota" else "dense/picodet_v2")


def golden_batch(file, **changes):
    truth = {name: file[f"gt/{name}"] for name in ("boxes", "classes")} | {"valid": file["gt/valid"] > 0}
    return {"image": np.zeros((3, 160, 224, 3), np.float32)} | truth | changes


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(task, predicted, fixed, batch, step):
    """As a step computes them: sums of the terms, over the sum of the weights, which is at least 1.

    Args:
      task: the task.
      predicted: outputs with gradients.
      fixed: outputs without.
      batch: from `train_transform`, stacked.
      step: the step's number.
    """
    prepared = task.prepare(batch, jax.random.key(0), step)

    def loss(predicted):
        terms, weights = task.loss(fixed | predicted, prepared, task.held)
        assert all(term.shape == (len(batch["image"]),) for term in terms.values())
        total = len(batch["image"]) if weights is None else jnp.maximum(jnp.sum(weights), 1)
        totals = {name: jnp.sum(term) / total for name, term in terms.items()}
        return sum(totals.values()), totals

    return jax.value_and_grad(loss, has_aux=True)(predicted)


def golden_loss(assigner, *, shift=0.0, **changes):
    """The loss, its terms and its gradients for a golden file's outputs, with other values in the batch."""
    file = golden_file(assigner)
    predicted, fixed = {"reg_logits": file["reg_logits"]}, {"boxes": file["boxes"]}
    if assigner == "simota":
        predicted["cls_logits"] = file["cls_logits"] + np.float32(shift)
        fixed["scores"] = np.asarray(jax.nn.sigmoid(predicted["cls_logits"]))
    else:
        predicted["scores"] = file["scores"]
    step = TAL_STEP if assigner == "tal" else TAL_STEP - 1
    batch = golden_batch(file, **changes)
    return loss_and_gradients(task(legacy=assigner == "simota"), predicted, fixed, batch, jnp.int32(step))


@pytest.mark.slow
@pytest.mark.parametrize("assigner", SUFFIX)
def test_the_loss_and_its_gradients_are_the_golden_ones(assigner):
    file, suffix = golden_file(assigner), SUFFIX[assigner]
    (loss, terms), gradients = golden_loss(assigner)
    # Sums of some thousand float32 numbers: the golden ones differ from the rules in float64 by 1e-6.
    np.testing.assert_allclose(loss, file[f"loss{suffix}/total"], rtol=1e-5)
    for name, theirs in REFERENCE_NAMES.items():
        np.testing.assert_allclose(terms[name], file[f"loss{suffix}/{theirs}"], rtol=1e-5)
    for name, gradient in gradients.items():
        expected = file[f"grad{suffix}/{name}"]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_sum_of_weights_below_one_counts_as_one_with_the_legacy_head():
    file = golden_file("simota")
    (_, terms), _ = golden_loss("simota", shift=file["low/shift"])
    for name, theirs in REFERENCE_NAMES.items():
        np.testing.assert_allclose(terms[name], file[f"low/loss/{theirs}"], rtol=1e-5)


@pytest.mark.parametrize("assigner", SUFFIX)
def test_a_batch_without_boxes_has_a_finite_loss(assigner):
    file = golden_file(assigner)
    scores = np.asarray(jax.nn.sigmoid(file["cls_logits"]) if assigner == "simota" else file["scores"], np.float64)
    # Every class of every point is a negative, of focal weight 0.75 p^2, and nothing divides the sum.
    negatives = np.sum(-0.75 * scores**2 * np.log1p(-scores))
    for boxes in (file["gt/boxes"], np.full_like(file["gt/boxes"], np.nan)):  # no row that is not valid is read
        (loss, terms), gradients = golden_loss(assigner, valid=np.zeros((3, 6), bool), boxes=boxes)
        np.testing.assert_allclose(loss, negatives, rtol=1e-5)
        assert terms["giou"] == terms["dfl"] == 0
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())
        assert not np.any(gradients["reg_logits"])


@pytest.mark.parametrize("step", [0, TAL_STEP - 1, TAL_STEP, TAL_STEP + 1])
def test_tal_assigns_from_its_step_on(step):
    batch = golden_batch(golden_file("tal"))
    prepared = jax.jit(task().prepare)(batch, jax.random.key(0), jnp.int32(step))
    assert prepared.keys() == batch.keys() | {"by_tal"}
    np.testing.assert_array_equal(prepared["by_tal"], [step >= TAL_STEP] * 3)
    for name, array in batch.items():
        np.testing.assert_array_equal(prepared[name], array)


def test_shapes_are_those_of_a_transformed_example(tmp_path):
    config = configured()
    config.augment.max_boxes = 6
    example = coco(write_coco(tmp_path), "train2017")[0] | {"crowd": np.zeros(3, bool)}
    preprocessing = Preprocessing((160, 192), crop_mode="squash", crop_ratio=1.0)
    transformed = Detection.train_transform(config.augment, preprocessing)(example, np.random.default_rng(0))
    shapes = task().example_shapes((160, 192))
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in transformed.items()
    }
    # As a contact sheet shows them: first as the data set has them, then transformed.
    assert task().caption(transformed, "abc") == task().caption(example, "abc") == "3 boxes"
    assert task().caption(transformed | {"valid": np.arange(6) < 1}, "abc") == "1 box"
    axis = Figure().subplots()
    axis.imshow(np.zeros((160, 192, 3)))
    task().draw(axis, transformed, ["red", "white", "blue"])
    assert len(axis.patches) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def test_answers_are_detections_in_the_pixels_of_the_images():
    """Boxes that do not overlap, so that suppression leaves those above the threshold; two images, and two forms."""
    height, width, sizes = 160, 224, np.int32([[480, 448], [80, 672]])
    corners = np.float32([[8, 16, 40, 56], [100, 20, 230, 90], [-12, 100, 60, 172], [120, 110, 140, 150]])
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 1, (2, 4, 5)).astype(np.float32) * (rng.random((2, 4, 5)) < 0.3)
    scores[1, 3] = 0.025  # the threshold itself, which is not above it
    train_form = {"boxes": np.stack([corners, corners + 1]), "scores": scores}
    inference_form = {"boxes": train_form["boxes"] + np.float32(2.24), "scores": scores * np.float32(0.5)}
    outputs = dict(zip(FORMS, (train_form, inference_form), strict=True))
    batch = {"image": np.zeros((2, height, width, 3), np.float32), "size": sizes, "weight": np.ones(2, np.float32)}
    answers = jax.device_get(jax.jit(task(suppression=Suppression(max_detections=12)).answer)(outputs, outputs, batch))
    assert answers.keys() == {f"{form}_{name}" for form in FORMS for name in ("boxes", "scores", "classes")} | {
        "difference"
    }
    for form, predicted in outputs.items():
        for image, (rows, columns) in enumerate(sizes.tolist()):
            found = [
                (float(predicted["scores"][image, point, label]), point, label)
                for point in range(4)
                for label in range(5)
                if predicted["scores"][image, point, label] > 0.025
            ]
            found.sort(key=lambda one: -one[0])
            assert found
            rest = 12 - len(found)
            np.testing.assert_array_equal(
                answers[f"{form}_scores"][image], [score for score, _, _ in found] + [0] * rest
            )
            np.testing.assert_array_equal(
                answers[f"{form}_classes"][image], [label for _, _, label in found] + [-1] * rest
            )
            for row, (_, point, _) in enumerate(found):
                x0, y0, x1, y1 = predicted["boxes"][image, point].tolist()
                expected = [
                    min(max(x0 / width * columns, 0), columns),
                    min(max(y0 / height * rows, 0), rows),
                    min(max(x1 / width * columns, 0), columns),
                    min(max(y1 / height * rows, 0), rows),
                ]
                # Two roundings of float32, of up to 672 pixels.
                np.testing.assert_allclose(answers[f"{form}_boxes"][image, row], expected, rtol=0, atol=1e-4)
    # Boxes moved by 2.24 of 224 pixels, and scores halved: the larger one, image by image.
    halves = scores.max((1, 2)) / 2
    np.testing.assert_allclose(answers["difference"], np.maximum(halves, 0.01), rtol=1e-5)


def detect_by_brightness(model, variables, images, **_):
    """Stands in for a detector's `apply`, whose compilation takes most of a minute: 25 points, and four classes."""
    bright = images.reshape(-1, 5, 32, 5, 32, 3).mean((2, 4, 5)).reshape(-1, 25, 1)
    scores = jax.nn.sigmoid(bright * jnp.array([1.0, -2.0, 3.0, -4.0]))
    centers = 32 * jnp.stack(jnp.divmod(jnp.arange(25.0), 5)[::-1], axis=-1) + 16
    half = (30 if model.spec.form == "inference" else 24) * jax.nn.sigmoid(bright * jnp.array([3.0, -2.0]))
    return {"scores": scores, "boxes": jnp.concatenate([centers - half, centers + half], axis=-1)}


PREPROCESSING = Preprocessing(160, crop_mode="squash", crop_ratio=1.0)


@pytest.fixture
def evaluate(monkeypatch):
    """(data set of four classes, batch size, options of `make_evaluator`) -> answers."""
    monkeypatch.setattr("castling_jax.training.evaluate.apply", detect_by_brightness)

    def run(dataset, batch_size, **options):
        evaluator = make_evaluator(
            small_model(),
            dataset,
            task(num_classes=4, suppression=Suppression(max_detections=30)),
            transform=Detection.eval_transform(PREPROCESSING),
            preprocessing=PREPROCESSING,
            batch_size=batch_size,
            mesh=make_mesh({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}),
            **options,
        )
        return evaluator(random_variables(small_model()), 0.05)

    return run


@pytest.fixture
def found_objects(tmp_path, evaluate):
    """A file of COCO's and its data set, whose objects lie near some of the detections."""
    content = coco_content(counts=(1, 0, 0, 0))
    content["categories"].append({"id": 91, "name": "yak"})
    dataset = coco(write_coco(tmp_path, "val", content), "val")
    results = written(evaluate(dataset, 2), dataset)
    assert len(results) == 4 * 30
    content["annotations"] = []
    for one in results[:: len(results) // 20]:
        x, y, width, height = one["bbox"]
        annotation = {"id": len(content["annotations"]) + 1, "bbox": [x, y, 0.8 * width, 0.9 * height]}
        annotation |= {"image_id": one["image_id"], "category_id": one["category_id"]}
        content["annotations"].append(annotation | {"area": width * height / 2, "iscrowd": 0})
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return content, coco(tmp_path, "val")


def test_an_evaluation_does_not_depend_on_the_size_of_its_batches(found_objects, evaluate):
    content, dataset = found_objects
    whole, padded = (evaluate(dataset, batch_size) for batch_size in (2, 3))
    figures = whole.figures()
    assert (figures["eval_images"], figures["eval_corrupt"]) == (4, 0)
    assert padded.figures() == pytest.approx(figures, abs=1e-6)
    assert 0.01 < figures["mAP_train_form"] != figures["mAP_inference_form"] > 0.01
    # The figures are those of the annotations' file and of the detections that are written.
    results = written(whole, dataset)
    assert {one["image_id"] for one in results} == {image["id"] for image in content["images"]}
    stats, _ = pycocotools(content, results)
    expected = {f"{name}_inference_form": value for name, value in zip(FIGURES, stats, strict=True) if value != -1}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for image, (height, width) in zip(content["images"], SIZES, strict=True):
        for x, y, w, h in (one["bbox"] for one in results if one["image_id"] == image["id"]):
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height


def test_a_corrupt_image_is_left_out_and_counted(found_objects, tmp_path, evaluate):
    content, dataset = found_objects
    whole = evaluate(dataset, 2)
    (tmp_path / "val" / "002.jpg").write_bytes(b"no image any more")
    found = evaluate(dataset, 2, max_corrupt_share=1.0)
    figures = found.figures()
    assert (figures["eval_images"], figures["eval_corrupt"]) == (3, 1)
    assert found.image.tolist() == [0, 1, 3]
    for form in FORMS:
        # The images of a batch are others, and with them float32's sums.
        np.testing.assert_allclose(getattr(found, form).boxes, getattr(whole, form).boxes[[0, 1, 3]], atol=1e-4)
    missing = content["images"][2]["id"]
    rest = {
        name: [x for x in content[name] if x.get(key) != missing]
        for name, key in (("images", "id"), ("annotations", "image_id"))
    }
    stats, _ = pycocotools(content | rest, written(found, dataset))
    assert figures["mAP_inference_form"] == pytest.approx(stats[0], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# From a configuration.


def configured(**model):
    """A configuration that fits detectors."""
    config = default_config()
    config.model.update({"name": "picodet_s", "image_size": 160, **model})
    config.dataset.update({"crop_mode": "squash", "crop_ratio": 1.0})
    return config


@functools.cache
def picodet(**arguments):
    sizes = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8}
    return abstract_model("picodet_s", num_classes=3, image_size=160, backbone_arguments=sizes, **arguments)


def test_a_task_is_what_the_configuration_says():
    config = configured()
    config.loss.atss_epochs = 2.5
    config.augment.max_boxes = 17
    config.dataset.exif = True
    config.evaluation.update({"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 9})
    assert Detection.from_config(config, picodet(), steps_per_epoch=11) == Detection(
        num_classes=3,
        legacy=False,
        tal_step=28,  # 27.5, to the nearest even number
        max_boxes=17,
        suppression=Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=9),
        exif=True,
    )
    assert Detection.from_config(configured(neck="csp_pan"), picodet(neck="csp_pan")).legacy
    config.augment.image_sizes = (160, 192)
    config.train.accumulate_steps = 2
    Detection.from_config(config, picodet())


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "dataset.crop_mode",
            "center",
            "set config.dataset.crop_mode = 'squash' and crop_ratio = 1.0, not 'center' and 1.0",
        ),
        (
            "dataset.crop_ratio",
            0.875,
            "set config.dataset.crop_mode = 'squash' and crop_ratio = 1.0, not 'squash' and 0.875",
        ),
        ("augment.image_sizes", (160, 170), "multiples of 32 pixels and at least 160, not 170 x 170"),
        ("augment.image_sizes", (128,), "multiples of 32 pixels and at least 160, not 128 x 128"),
    ],
)
def test_fields_that_do_not_fit_a_detector_are_refused(refuses, field, value, sentence):
    config = configured()
    config[field.split(".")[0]][field.split(".")[1]] = value
    with refuses(sentence):
        Detection.from_config(config, picodet())


def test_the_legacy_head_does_not_accumulate(refuses):
    config = configured(neck="csp_pan")
    config.train.accumulate_steps = 2
    with refuses("config.train.accumulate_steps must be 1 with neck='csp_pan'", "not 2."):
        Detection.from_config(config, picodet(neck="csp_pan"))


def test_a_detector_has_no_teacher(refuses):
    teacher = Teacher(picodet(), {}, "hard", 0.5, 3.0)
    with refuses("a detector does not learn from a teacher: leave out config.distillation."):
        Detection.from_config(configured(), picodet(), teacher)


def test_what_a_detector_does_not_use_is_refused_before_anything_is_read(refuses, tmp_path):
    for split, counts in (("train", (3, 0, 2, 1)), ("val", (1, 0, 0, 0)), ("test", (0, 0, 0, 0))):
        write_coco(tmp_path, split, coco_content(counts=counts))

    def prepared(**model):
        config = configured(**model)
        config.dataset.name = f"coco:{tmp_path}"
        return config

    config = prepared()
    config.loss.label_smoothing = 0.2
    config.distillation.update(kind="hard", teacher="nowhere")
    with refuses("this picodet_s does not use config.loss.label_smoothing, config.distillation.kind, "):
        set_up(config)
    config = prepared(neck="csp_pan")
    config.loss.atss_epochs = 2.0
    with refuses("this picodet_s does not use config.loss.atss_epochs: keep the default."):
        set_up(config)
    config = prepared()
    for split in ("train_split", "test_split"):
        config = prepared()
        config.dataset[split] = "test"
        with refuses("none of the 4 images has an object that is no crowd"):
            set_up(config)
    # The compile report has no data to look at.
    check_dataset(picodet(), Unread(8, 3, "boxes"))
