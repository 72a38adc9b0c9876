import colorsys
import dataclasses
import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from castling_jax.data.loader import OneOf, training_batches
from castling_jax.data.pixels import HUE_DEGREES, random_distortion
from castling_jax.data.sources import load_dataset
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.detection.transforms import (
    CROP_ASPECTS,
    CROP_SCALES,
    OVERLAPS,
    TrainTransform,
    eval_transform,
    random_box_crop,
    train_transform,
)
from castling_jax.training.config import default_config
from tests.data.box_files import SIZES, write_coco

HALF = Preprocessing(64)
PLAIN = {"box_crop": False, "flip": 0.0, "distort": 0.0, "max_boxes": 5}
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
CORNERS = [(5, 10, 45, 40), (60, 5, 110, 60), (10, 60, 50, 85), (70, 70, 115, 88)]


def transform(size=(64, 64), **options):
    return TrainTransform(HALF, size, **PLAIN | options)


def rectangles(size, corners):
    """A black image with a rectangle of its own colour for each box, as an example; the boxes do not overlap."""
    picture = Image.new("RGB", size[::-1])
    for (x0, y0, x1, y1), color in zip(corners, COLORS, strict=False):
        ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill=color)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "image": file.getvalue(),
        "boxes": np.array(corners, np.float32).reshape(-1, 4),
        "classes": np.arange(len(corners), dtype=np.int32),
        "crowd": np.zeros(len(corners), bool),
        "size": np.array(size, np.int32),
    }


EXAMPLE = rectangles((90, 120), CORNERS)


def rendered(image, color):
    """The box (x0, y0, x1, y1) of the pixels that are of a colour by more than a half."""
    pixels = image / 255
    is_on = np.array(color, bool)
    share = pixels[..., is_on].min(-1) - pixels[..., ~is_on].max(-1)
    rows, columns = np.nonzero(share > 0.5)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("seed", range(30))
def test_boxes_are_where_the_image_shows_them(seed):
    """Random crops and flips; the boxes that are valid lie around their colours in the result."""
    result = transform(size=(96, 128), box_crop=True, flip=0.5)(EXAMPLE, np.random.default_rng(seed))
    valid = result["valid"]
    assert valid.any()
    for box, number in zip(result["boxes"][valid], result["classes"][valid], strict=True):
        # An edge is rounded to a pixel, and a resize takes its filter's weights at whole pixels of the image, which
        # moves half a colour by up to a tenth of a pixel.
        np.testing.assert_allclose(rendered(result["image"], COLORS[number]), box, atol=0.6)


@pytest.mark.parametrize("seed", range(30))
def test_a_box_stays_when_its_centre_is_inside_and_is_clipped(seed):
    """By brute force: a mask of each box is cut out as the image is. The result has the crop's size."""
    top, left, height, width = random_box_crop((90, 120), EXAMPLE["boxes"], np.random.default_rng(seed))
    result = transform(size=(height, width), box_crop=True)(EXAMPLE, np.random.default_rng(seed))
    expected = {}
    for number, (x0, y0, x1, y1) in enumerate(CORNERS):
        mask = np.zeros((90, 120), bool)
        mask[y0:y1, x0:x1] = True
        rows, columns = np.nonzero(mask[top : top + height, left : left + width])
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        if left < x < left + width and top < y < top + height:
            expected[number] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    count = int(result["valid"].sum())
    assert result["classes"][:count].tolist() == list(expected)
    np.testing.assert_allclose(result["boxes"][:count], list(expected.values()), atol=1e-4)


def overlap(crop, box):
    """The IoU of one crop and one box."""
    (top, left, height, width), (x0, y0, x1, y1) = crop, box
    shared = max(min(x1, left + width) - max(x0, left), 0) * max(min(y1, top + height) - max(y0, top), 0)
    return shared / ((x1 - x0) * (y1 - y0) + height * width - shared)


def test_crops_are_what_ssd_draws():
    """How often there is none, and each crop's scale, aspect and best overlap."""
    boxes, size = EXAMPLE["boxes"], (90, 120)
    crops = [random_box_crop(size, boxes, np.random.default_rng(seed)) for seed in range(600)]
    best = []
    for top, left, height, width in crops:
        assert 0 <= top <= top + height <= 90
        assert 0 <= left <= left + width <= 120
        if (height, width) == size:
            continue
        best.append(max(overlap((top, left, height, width), box) for box in boxes.tolist()))
        scale, aspect = np.sqrt(height / 90 * width / 120), (width / 120) / (height / 90)
        # Sides are rounded down to pixels, of which the shortest has 19.
        assert CROP_SCALES[0] * 0.94 <= scale <= CROP_SCALES[1]
        assert CROP_ASPECTS[0] * 0.94 <= aspect <= CROP_ASPECTS[1] / 0.94
        assert any(
            top < (y0 + y1) / 2 < top + height and left < (x0 + x1) / 2 < left + width for x0, y0, x1, y1 in boxes
        )
    # All seven are drawn equally often. The one without a crop comes first in a seventh of the draws, and also where
    # those before it did not fit: 0.9 hardly ever fits boxes of these sizes, so that it is a sixth, or somewhat more.
    share = 1 - len(best) / len(crops)
    deviation = np.sqrt(1 / 6 * 5 / 6 / 600)
    assert 1 / 7 - 3 * deviation < share < 1 / 5 + 3 * deviation
    assert min(best) > 0
    assert OVERLAPS == (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)


def test_each_overlap_is_reached(monkeypatch):
    """One at a time, with a box so large that a crop can have any overlap with it."""
    box = np.float32([[1, 1, 89, 89]])
    for least in OVERLAPS[:-1]:
        monkeypatch.setattr("castling_jax.tasks.detection.transforms.OVERLAPS", (least,))
        crops = [random_box_crop((90, 90), box, np.random.default_rng(seed)) for seed in range(60)]
        found = [overlap(crop, box[0].tolist()) for crop in crops if crop != (0, 0, 90, 90)]
        assert len(found) >= 50  # of 0.9, not every 50 tries have one
        assert min(found) >= least
        assert min(found) < least + 0.15  # and no more than that is asked for


def test_an_image_without_boxes_is_not_cropped():
    example = rectangles((30, 40), [])
    assert random_box_crop((30, 40), example["boxes"], np.random.default_rng(0)) == (0, 0, 30, 40)
    result = transform(box_crop=True, flip=0.5, distort=0.5)(example, np.random.default_rng(0))
    assert not result["valid"].any()
    assert result["boxes"].shape == (5, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (500, 2)])
def test_tiny_images_are_cropped_too(size):
    for seed in range(30):
        box = random_box_crop(size, np.float32([[0, 0, size[1], size[0]]]), np.random.default_rng(seed))
        top, left, height, width = box
        assert min(top, left) >= 0
        assert min(height, width) >= 1
        assert top + height <= size[0]
        assert left + width <= size[1]


def test_shapes_types_and_padding():
    result = transform(size=(32, 48), flip=1.0)(EXAMPLE, np.random.default_rng(0))
    assert {name: (array.shape, array.dtype) for name, array in result.items()} == {
        "image": ((32, 48, 3), np.uint8),
        "boxes": ((5, 4), np.float32),
        "classes": ((5,), np.int32),
        "valid": ((5,), bool),
    }
    assert result["valid"].tolist() == [True] * 4 + [False]
    assert not result["boxes"][4].any()
    mirrored = np.array([(120 - x1, y0, 120 - x0, y1) for x0, y0, x1, y1 in CORNERS])
    np.testing.assert_allclose(result["boxes"][:4], mirrored * np.tile([48 / 120, 32 / 90], 2), rtol=1e-6)


def test_boxes_beyond_the_room_are_cut_off_and_crowds_left_out():
    example = EXAMPLE | {"crowd": np.array([False, True, False, False])}
    result = transform(max_boxes=2)(example, np.random.default_rng(0))
    assert result["classes"].tolist() == [0, 2]
    assert result["valid"].tolist() == [True, True]
    assert transform(max_boxes=4)(example, np.random.default_rng(0))["valid"].tolist() == [True, True, True, False]


def test_flip_is_as_often_as_asked():
    turned = transform(flip=1.0)(EXAMPLE, np.random.default_rng(0))["boxes"]
    flips = [transform(flip=0.3)(EXAMPLE, np.random.default_rng(seed))["boxes"] for seed in range(300)]
    share = np.mean([np.array_equal(boxes, turned) for boxes in flips])
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 300)


def test_evaluation_is_a_plain_resize():
    result = eval_transform(HALF)({"image": EXAMPLE["image"]})
    whole = Image.open(io.BytesIO(EXAMPLE["image"])).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(result["image"], whole)
    assert result["size"].tolist() == [90, 120]
    assert result.keys() == {"image", "size"}


@pytest.mark.parametrize("as_floats", [False, True])
def test_arrays_are_taken_too(as_floats):
    array = np.asarray(Image.open(io.BytesIO(EXAMPLE["image"])))
    example = EXAMPLE | {"image": array.astype(np.float32) / 255 if as_floats else array}
    changes = transform(box_crop=True, flip=0.5, distort=1.0)
    changes = dataclasses.replace(changes, preprocessing=Preprocessing(64, interpolation="bilinear"))
    found, expected = (changes(one, np.random.default_rng(3)) for one in (example, EXAMPLE))
    # Floats are not rounded after each of the resize's two passes, so that they differ by a level of 255, in a range of
    # 2. Brightness and contrast make it up to 1.5 times as much each, saturation 2.2 times (0.5 of the others' greys),
    # and the turn of the hue 1.3 times. Eight bits are rounded once more at the end.
    assert found["image"].dtype == (np.float32 if as_floats else np.uint8)
    images = [model_input(one["image"], HALF) for one in (found, expected)]
    np.testing.assert_allclose(*images, atol=2 / 255 * (1.5**2 * 2.2 * 1.3 + 0.5))
    np.testing.assert_array_equal(found["boxes"], expected["boxes"])


class Draws:
    """A random generator whose draws are given: which changes are on, their amounts, and their order."""

    def __init__(self, on, *, factor=1.3, turn=10.0):
        self.on, self.factor, self.turn = on, factor, turn

    def uniform(self, low, high, size=None):
        return self.turn if size is None else np.full(size, self.factor)

    def random(self, size):
        return np.array([0.0 if index in self.on else 1.0 for index in range(size)])

    def permutation(self, count):
        return np.array([*self.on, *(index for index in range(count) if index not in self.on)])


def pale(low, high):
    """Random colours between two levels of 255."""
    return np.random.default_rng(0).integers(low, high, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 1.5])
@pytest.mark.parametrize("order", [(0,), (1,), (2,), (2, 1), (1, 2), (0, 1, 2), (1, 0), (2, 0, 1)])
def test_colours_change_as_pillows_enhancers_change_them(factor, order):
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    pixels = pale(75, 120)  # no change below reaches 0 or 255, where Pillow clips after each step
    expected = Image.fromarray(pixels)
    for chosen in order:
        expected = enhancers[chosen](expected).enhance(factor)
    expected = np.asarray(expected, np.int32)
    assert 0 < expected.min() <= expected.max() < 255
    changed = random_distortion(pixels.astype(np.float32) / 255, Draws(order, factor=factor), 0.5)
    # Pillow cuts to whole levels after each step, and its greys are whole too: a step is off by up to 1 + |1 - factor|,
    # and the steps behind it multiply that by the factor.
    most = sum((1 + abs(1 - factor)) * factor**step for step in range(len(order)))
    assert np.abs(255 * changed - expected).max() <= most + 1e-3


def test_eight_bits_are_changed_as_floats_are_and_rounded():
    pixels = pale(0, 256)
    floats = pixels.astype(np.float32) / 255
    for seed in range(20):
        found, expected = (random_distortion(one, np.random.default_rng(seed), 0.5) for one in (pixels, floats))
        assert found.dtype == np.uint8
        # Half a level, and float32's rounding of up to 255.
        np.testing.assert_allclose(found, 255 * expected, rtol=0, atol=0.5 + 1e-3)
    assert random_distortion(pixels, np.random.default_rng(0), 0.0) is pixels


@pytest.mark.parametrize("degrees", [-18.0, -5.0, 12.0])
def test_the_hue_turns_and_the_brightness_stays(degrees):
    pixels = pale(90, 166).astype(np.float32) / 255
    changed = random_distortion(pixels, Draws((3,), turn=degrees), 0.5)
    before, after = (
        np.array([colorsys.rgb_to_yiq(*pixel) for pixel in image.reshape(-1, 3).tolist()])
        for image in (pixels, changed)
    )
    # colorsys has other digits in its matrix: 0.30 and 0.59 for 0.299 and 0.587, and likewise for the colours.
    np.testing.assert_allclose(after[:, 0], before[:, 0], atol=2e-3)
    (first, second) = (yiq[:, 1] + 1j * yiq[:, 2] for yiq in (before, after))
    is_strong = np.abs(first) > 0.05
    assert is_strong.mean() > 0.3
    np.testing.assert_allclose(np.angle(second / first, deg=True)[is_strong], degrees, atol=1)


def test_colours_change_as_often_and_as_much_as_asked():
    image = np.full((2, 2, 3), 0.5, np.float32)  # grey, which contrast, saturation and hue leave as it is
    values = np.array([random_distortion(image, np.random.default_rng(seed), 0.5)[0, 0, 0] for seed in range(800)])
    is_changed = np.abs(values - 0.5) > 1e-3  # in YIQ's digits, grey is grey to 1e-3
    assert abs(is_changed.mean() - 0.5) < 4 * np.sqrt(0.25 / 800)
    assert 0.249 <= values.min() < 0.27
    assert 0.73 < values.max() <= 0.751
    assert random_distortion(image, np.random.default_rng(0), 0.0) is image
    assert HUE_DEGREES == 18


def augment_of(**changes):
    augment = default_config().augment
    augment.update(changes)
    return augment


def test_pickled_transforms_do_the_same():
    original = train_transform(augment_of(box_crop=True, flip=0.5, distort=0.5, image_sizes=(32, 48)), HALF)
    copy = pickle.loads(pickle.dumps(original))
    for step in range(5):
        results = [one.of_step(1, step)(EXAMPLE, np.random.default_rng(step)) for one in (original, copy)]
        for name in results[0]:
            np.testing.assert_array_equal(results[0][name], results[1][name])
    single = [one(EXAMPLE, np.random.default_rng(3))["image"] for one in (original, copy)]  # as a contact sheet asks
    np.testing.assert_array_equal(*single)


def test_one_size_is_a_plain_transform():
    assert train_transform(augment_of(), HALF) == transform(max_boxes=100)
    assert train_transform(augment_of(image_sizes=(96,)), HALF).size == (96, 96)
    several = train_transform(augment_of(image_sizes=(32, 64, 96)), HALF)
    assert isinstance(several, OneOf)
    assert [one.size for one in several.transforms] == [(32, 32), (64, 64), (96, 96)]


class TestBatches:
    @pytest.fixture
    def options(self, tmp_path):
        augment = augment_of(box_crop=True, flip=0.5, distort=0.5, image_sizes=(32, 48, 64), max_boxes=3)
        dataset = load_dataset(f"coco:{write_coco(tmp_path)}", "train2017")
        return {"dataset": dataset, "batch_size": 3, "seed": 5, "transform": train_transform(augment, HALF)}

    def test_a_step_has_one_size_that_seed_and_step_decide(self, options):
        stream = training_batches(**options)
        batches = [next(stream) for _ in range(12)]
        sizes = [batch["image"].shape[1] for batch in batches]
        assert all(batch["image"].shape == (3, size, size, 3) for batch, size in zip(batches, sizes, strict=True))
        assert set(sizes) == {32, 48, 64}
        assert [options["transform"].of_step(5, step).size[0] for step in range(12)] == sizes
        others = training_batches(**options | {"seed": 6})
        assert [next(others)["image"].shape[1] for _ in range(12)] != sizes
        for batch in batches:
            assert (batch["boxes"] <= batch["image"].shape[1]).all()
            assert {name: array.dtype for name, array in batch.items()} == {
                "image": np.uint8,
                "boxes": np.float32,
                "classes": np.int32,
                "valid": bool,
            }

    def test_a_run_that_goes_on_and_processes_that_share_get_the_same(self, options):
        stream = training_batches(**options)
        expected = [next(stream) for _ in range(9)]
        resumed = training_batches(**options, first_step=4)
        part = training_batches(**options, rows=np.array([0, 2]), first_step=4)
        for batch in expected[4:]:
            for found, rows in ((next(resumed), slice(None)), (next(part), [0, 2])):
                for name in batch:
                    np.testing.assert_array_equal(found[name], batch[name][rows])

    @pytest.mark.slow
    def test_worker_processes_change_nothing(self, options):
        stream, workers = training_batches(**options), training_batches(**options, workers=2)
        for _ in range(6):
            expected, found = next(stream), next(workers)
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])

    def test_a_damaged_image_gives_its_place_to_another_at_the_steps_size(self, options):
        dataset = options["dataset"]
        (dataset.folder / dataset.files[2]).write_bytes(b"no image")
        stream = training_batches(**options, max_corrupt_share=1.0)
        sizes = [next(stream)["image"].shape[1] for _ in range(8)]
        assert sizes == [options["transform"].of_step(5, step).size[0] for step in range(8)]


def test_evaluation_gives_boxes_back_their_image(tmp_path):
    """What is found in the model's input, scaled by `size`, is in the pixels of the image."""
    dataset = load_dataset(f"coco:{write_coco(tmp_path)}", "train2017")
    for index, size in enumerate(SIZES):
        result = eval_transform(HALF)(dataset[index])
        assert result["image"].shape == (64, 64, 3)
        assert result["size"].tolist() == list(size)
