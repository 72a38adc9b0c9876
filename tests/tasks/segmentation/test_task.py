"""Segmentation as a task: its loss as the step divides it, answers at the images' own size, figures counted by hand."""

import csv
import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from castling_jax.data.masks import IGNORED, read_labels
from castling_jax.data.preprocess import preprocess
from castling_jax.data.sources import Unread, load_dataset
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.segmentation.losses import pixel_cross_entropy, soft_dice_loss
from castling_jax.tasks.segmentation.task import Segmentation
from castling_jax.tasks.task import FORMS, Teacher
from castling_jax.training.config import default_config
from castling_jax.training.evaluate import make_evaluator
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import make_mesh
from tests.data.mask_files import NAMES, SIZES, VOID, labels, png, write_masks
from tests.models.small import random_variables, small_model
from tests.models.test_segmenter import small_segmenter
from tests.tasks.segmentation.test_windows import joined_by_hand

SIZE = (16, 24)
PREPROCESSING = Preprocessing(SIZE, crop_mode="squash", crop_ratio=1.0)


def task(**changes):
    return Segmentation(**({"num_classes": 3, "dice": 0.0, "exif": False} | changes))


@pytest.mark.parametrize("dice", [0.0, 0.7])
def test_the_loss_is_a_sum_over_pixels_and_one_division(dice):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 8, 8, 3), np.float32))
    mask = rng.integers(0, 3, (4, 8, 8)).astype(np.uint8)
    mask[0, :7] = IGNORED
    mask[3] = IGNORED
    terms, weights = task(dice=dice).loss({"logits": logits}, {"mask": jnp.asarray(mask)}, {})
    np.testing.assert_array_equal(weights, (mask != IGNORED).sum((1, 2)))
    total, _ = pixel_cross_entropy(logits, jnp.int32(mask))
    np.testing.assert_array_equal(terms["cross_entropy"], total)
    assert terms.keys() == ({"cross_entropy", "dice"} if dice else {"cross_entropy"})
    if dice:
        expected = dice * weights * soft_dice_loss(logits, jnp.int32(mask))
        np.testing.assert_allclose(terms["dice"], expected, rtol=1e-6)


def segment_by_colour(model, variables, images, **_):
    """Stands in for a segmenter's `apply`, whose compilation takes a while: other logits in each form."""
    scale = 3.0 if model.spec.form == "inference" else 2.0
    weights = jnp.array([[1.0, -1, 0.5], [0.2, 1, -1], [-1, 0.3, 1]])
    return {"logits": scale * images @ weights + jnp.array([0.1, 0, -0.1]) * scale}


@pytest.fixture
def evaluate(monkeypatch):
    """(data set, batch size, options of `make_evaluator`) -> answers."""
    monkeypatch.setattr("castling_jax.training.evaluate.apply", segment_by_colour)

    def run(dataset, batch_size, *, preprocessing=PREPROCESSING, **options):
        evaluator = make_evaluator(
            small_model(),
            dataset,
            task(),
            transform=Segmentation.split_transform(preprocessing, dataset),
            batch_size=batch_size,
            mesh=make_mesh({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}),
            preprocessing=preprocessing,
            **options,
        )
        return evaluator(random_variables(small_model()), 0.05)

    return run


def counted_by_hand(dataset, form, indices=range(4), preprocessing=PREPROCESSING):
    """Intersections and unions of the classes, right pixels and pixels, pixel by pixel; and the sum of the losses."""
    both, either = np.zeros(3), np.zeros(3)
    right = pixels = 0
    loss = 0.0
    model = small_model(form="inference" if form == "inference_form" else "train")
    transform = Segmentation.eval_transform(preprocessing)
    for index in indices:
        example = dataset[index]
        size = np.asarray(Image.open(io.BytesIO(example["image"]))).shape[:2]
        truth = read_labels(example, size)
        seen = transform(example)
        images = model_input(seen["image"].reshape(-1, *SIZE, 3), preprocessing)
        logits = segment_by_colour(model, None, images)["logits"]
        logits = joined_by_hand(logits, seen["windows"], size)
        answer = logits.argmax(-1)
        counts = truth != IGNORED
        for label in range(3):
            both[label] += ((truth == label) & (answer == label)).sum()
            either[label] += (((truth == label) | (answer == label)) & counts).sum()
        right += (truth == answer).sum()
        pixels += counts.sum()
        shares = (
            np.log(np.exp(logits).sum(-1))
            - np.take_along_axis(logits, np.where(counts, truth, 0)[..., None].astype(int), -1)[..., 0]
        )
        loss += shares[counts].sum()
    return both, either, right, pixels, loss


@pytest.mark.slow
@pytest.mark.parametrize("crop_mode", ["squash", "slide"])
def test_figures_are_those_of_a_count_by_hand(tmp_path, evaluate, crop_mode):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    preprocessing = dataclasses.replace(PREPROCESSING, crop_mode=crop_mode)
    answers = evaluate(dataset, 2, preprocessing=preprocessing)
    figures = answers.figures()
    for form in FORMS:
        both, either, right, pixels, loss = counted_by_hand(dataset, form, preprocessing=preprocessing)
        # At a pixel whose two best logits are nearly equal, float32 and float64 may differ in the answer.
        assert figures[f"mIoU_{form}"] == pytest.approx(np.mean(both / either), abs=1 / pixels)
        assert figures[f"pixel_accuracy_{form}"] == pytest.approx(right / pixels, abs=1 / pixels)
    assert figures["eval_loss"] == pytest.approx(loss / pixels, rel=1e-5)
    assert (figures["eval_images"], figures["eval_corrupt"]) == (4, 0)
    # 2 x and 3 x the same numbers: a third of the larger one's largest, which is above 1.
    assert figures["max_difference"] == pytest.approx(1 / 3, rel=1e-5)
    assert "segmentation.png" in answers.files(NAMES)


def test_an_evaluation_does_not_depend_on_the_size_of_its_batches(tmp_path, evaluate):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    whole, padded = (evaluate(dataset, batch_size) for batch_size in (2, 3))
    np.testing.assert_array_equal(whole.inference_form, padded.inference_form)
    assert padded.figures() == pytest.approx(whole.figures(), rel=1e-6)


def test_a_corrupt_mask_is_left_out_and_counted(tmp_path, evaluate):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    (tmp_path / "train_labels" / "001.png").write_bytes(png(np.full(SIZES[1], 9, np.uint8)))
    figures = evaluate(dataset, 2, max_corrupt_share=1.0).figures()
    assert (figures["eval_images"], figures["eval_corrupt"]) == (3, 1)
    both, either, right, pixels, _ = counted_by_hand(dataset, "inference_form", (0, 2, 3))
    assert figures["mIoU_inference_form"] == pytest.approx(np.mean(both / either), abs=1 / pixels)
    assert figures["pixel_accuracy_inference_form"] == pytest.approx(right / pixels, abs=1 / pixels)


def test_classes_that_are_nowhere_do_not_count(tmp_path, evaluate, refuses):
    """mIoU is the mean over the classes that masks or answers have; a class that is only answered has the IoU 0."""
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    answers = evaluate(dataset, 2)
    matrix = np.zeros((4, 3, 3), np.int32)
    matrix[:, 0] = [6, 2, 0]

    def figures(matrix):
        return type(answers)(**(vars(answers) | {"inference_form": matrix, "train_form": matrix})).figures()

    assert figures(matrix)["mIoU_inference_form"] == pytest.approx((6 / 8 + 0) / 2)
    assert figures(matrix)["pixel_accuracy_inference_form"] == pytest.approx(6 / 8)
    with refuses("none of the 4 images evaluated has a pixel with a class."):
        figures(np.zeros_like(matrix))


def test_files_and_classes(tmp_path, evaluate):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    answers = evaluate(dataset, 2)
    both, either, *_ = counted_by_hand(dataset, "inference_form")
    rows = answers.by_class(NAMES)
    for label, name in enumerate(NAMES):
        masks = [labels(size, number) == label for number, size in enumerate(SIZES)]
        assert rows[name]["pixels"] == sum(mask.sum() for mask in masks)
        assert rows[name]["images"] == sum(mask.any() for mask in masks)
        assert rows[name]["mIoU"] == pytest.approx(both[label] / either[label], abs=1e-3)
    files = answers.files(NAMES)
    assert files.keys() == {"classes.csv", "confusion.png", "segmentation.png"}
    table = list(csv.reader(io.StringIO(files["classes.csv"].decode())))
    assert table[0] == ["class", "images", "pixels", "IoU", "accuracy"]
    assert [row[0] for row in table[1:]] == list(NAMES)
    counts = answers.confusion("inference_form")
    assert [float(row[4]) for row in table[1:]] == pytest.approx((np.diag(counts) / counts.sum(1)).tolist())
    assert Image.open(io.BytesIO(files["segmentation.png"])).size[0] > 300


def test_shapes_are_those_of_a_transformed_example(tmp_path):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    transformed = Segmentation.train_transform(configured().augment, PREPROCESSING)(
        dataset[0], np.random.default_rng(0)
    )
    assert {name: (x.shape, x.dtype) for name, x in task().example_shapes(SIZE).items()} == {
        name: (x.shape, x.dtype) for name, x in transformed.items()
    }
    # As a contact sheet shows them: first as the data set has them, then transformed.
    assert task().caption(dataset[0], "abc") == task().caption(transformed, "abc") == "3 classes"
    assert task().caption({"mask": np.full((2, 2), 1, np.uint8)}, "abc") == "1 class"
    axis = Figure().subplots()
    task().draw(axis, transformed, "abc")
    task().draw(
        axis, Segmentation.eval_transform(PREPROCESSING)(dataset[0]), "abc"
    )  # has no mask, and nothing is drawn
    assert len(axis.images) == 1


# ---------------------------------------------------------------------------------------------------------------------
# From a configuration.


def configured(**model):
    """A configuration that fits segmenters."""
    config = default_config()
    config.model.update({"name": "pyramid_segmenter", "image_size": SIZE, **model})
    config.dataset.update({"crop_mode": "squash", "crop_ratio": 1.0})
    return config


def test_a_task_is_what_the_configuration_says():
    config = configured()
    config.loss.dice = 0.5
    config.dataset.exif = True
    assert task_of(small_segmenter()) is Segmentation
    assert Segmentation.from_config(config, small_segmenter()) == Segmentation(num_classes=5, dice=0.5, exif=True)


@pytest.mark.parametrize(("field", "value"), [("crop_mode", "center"), ("crop_ratio", 0.875)])
def test_images_are_seen_whole(refuses, field, value):
    config = configured()
    config.dataset[field] = value
    with refuses("a segmenter sees whole images: set config.dataset.crop_mode = 'squash' or 'slide' and crop_ratio"):
        Segmentation.from_config(config, small_segmenter())


def test_windows_are_for_segmenters(refuses):
    config = configured()
    config.dataset.crop_mode = "slide"
    assert Segmentation.from_config(config, small_segmenter()).num_classes == 5
    with refuses("config.dataset.crop_mode = 'slide' is for segmenters: take 'center' or 'squash'."):
        task_of(small_model()).from_config(config, small_model())
    with refuses("preprocess cannot have a model see windows of an image (crop_mode 'slide'): predict does."):
        preprocess(np.zeros((4, 4, 3), np.uint8), dataclasses.replace(PREPROCESSING, crop_mode="slide"))


def test_a_segmenter_has_no_teacher(refuses):
    with refuses("a segmenter does not learn from a teacher: leave out config.distillation."):
        Segmentation.from_config(configured(), small_segmenter(), Teacher(small_segmenter(), {}, "hard", 0.5, 3.0))


def test_what_a_segmenter_does_not_use_is_refused_before_anything_is_read(refuses, tmp_path):
    for split in ("train", "val", "test"):
        write_masks(tmp_path, split)

    def prepared(**fields):
        config = configured(backbone="deit_micro", patch_size=16, depth=1)
        config.dataset.update(name=f"masks:{tmp_path}", ignore_label=VOID, **fields)
        return config

    config = prepared()
    config.loss.label_smoothing = 0.2
    config.augment.box_crop = True
    with refuses("this pyramid_segmenter does not use config.augment.box_crop, config.loss.label_smoothing: keep the"):
        set_up(config)
    with refuses("deit_micro needs images with label, and these have mask."):
        config = prepared()
        config.model.update(name="deit_micro", backbone=None, image_size=32)
        set_up(config)
    for mask in (tmp_path / "test_labels").iterdir():
        mask.write_bytes(png(np.full((4, 4), VOID, np.uint8)))
    with refuses("none of the 4 masks has a pixel with a class: choose another split."):
        set_up(prepared(test_split="test"))
    for number, mask in enumerate((tmp_path / "train_labels").iterdir()):  # black and white, and white is no class
        mask.write_bytes(png(np.full((4, 4), VOID * (number > 0), np.uint8)))
    (tmp_path / "classes.txt").unlink()
    with refuses("a segmenter tells at least two classes apart, and the data set has 1: a pixel's class is 0, 1, 2"):
        set_up(prepared())
    for field in ("scale_range", "distort"):
        config = default_config()
        config.augment[field] = {"scale_range": (0.5, 2.0), "distort": 0.5}[field]
        with refuses(f"this deit_tiny does not use config.augment.{field}: keep the default."):
            set_up(config, datasets=(Unread(200, 10), Unread(200, 10)))
