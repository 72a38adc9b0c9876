import io
import math
import pickle

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from castling_jax.data.geometry import center_crop_box, random_resized_crop_box
from castling_jax.data.pixels import color_jitter, random_erased_box, random_shift
from castling_jax.data.transforms import EvalTransform
from castling_jax.normalization import model_input, normalize_images
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.transforms import train_transform
from castling_jax.training.config import default_config

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERYTHING = {
    "crop_scale": (0.08, 1.0),
    "flip": 0.5,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "shift_pixels": 1,
    "erasing": 0.5,
}


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def augment_of(**changes):
    augment = default_config().augment
    augment.update(changes)
    return augment


def training(size, **changes):
    return train_transform(augment_of(**changes), Preprocessing(image_size=size, **HALF))


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_random_shift_is_a_whole_pixel_translation(dtype):
    image = np.random.default_rng(0).random((8, 6, 3), np.float32)
    image = np.uint8(255 * image) if dtype == np.uint8 else image
    shifted = {
        scipy.ndimage.shift(image, (rows, columns, 0), order=0).tobytes()
        for rows in range(-2, 3)
        for columns in range(-2, 3)
    }
    seen = {random_shift(image, np.random.default_rng(seed), 2).tobytes() for seed in range(400)}
    assert seen == shifted  # every one of the 25 translations, and nothing else


def test_normalize_maps_the_unit_interval_to_plus_minus_one():
    image = np.broadcast_to(np.float32([0, 0.5, 1])[:, None, None], (3, 2, 3))
    np.testing.assert_array_equal(
        normalize_images(image, Preprocessing(8)), np.broadcast_to(np.float32([-1, 0, 1])[:, None, None], (3, 2, 3))
    )


def test_normalize_subtracts_each_channels_mean_and_divides_by_its_deviation():
    image = np.random.default_rng(0).random((4, 5, 3), np.float32)
    expected = (image - np.float32(IMAGENET["mean"])) / np.float32(IMAGENET["std"])
    np.testing.assert_array_equal(normalize_images(image, Preprocessing(5, **IMAGENET)), expected)


def test_crop_boxes_have_the_areas_and_aspect_ratios_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_crop_box((375, 500), (0.08, 0.6), rng) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 375
    assert (left + width).max() == 500
    areas, ratios = height * width / (375 * 500), width / height
    # Sides are rounded to whole pixels, of which the smallest box has some 106 a side.
    assert areas.min() > 0.08 - 2e-3
    assert areas.max() < 0.6 + 2e-3
    assert ratios.min() > 3 / 4 - 1e-2
    assert ratios.max() < 4 / 3 + 1e-2
    # A box that is too high is drawn again: of those that cannot be, both are uniform; five standard deviations.
    fits = areas < 0.3 * 0.99  # as 4/3 high, sqrt(.3 * 500 * 375 / .75) = 273 pixels
    assert abs(np.mean(areas[fits]) - (0.08 + 0.3) / 2) < 5 * (0.3 - 0.08) / math.sqrt(12 * fits.sum())
    logs = np.log(ratios[fits])
    assert abs(np.mean(logs)) < 5 * 2 * math.log(4 / 3) / math.sqrt(12 * fits.sum())
    assert abs(np.std(logs) - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01


class Scripted:
    """A generator that draws what it is told to: shares of the ranges it is asked for."""

    def __init__(self, *shares):
        self.shares = list(shares)

    def uniform(self, low, high):
        return low + self.shares.pop(0) * (high - low)

    def integers(self, high):
        return int(self.shares.pop(0) * high)


def test_a_crop_box_that_does_not_fit_is_drawn_again():
    # The whole area is too wide at 4/3; a quarter of it at 1 is 100 x 100, at the middle of the rows that are left.
    generator = Scripted(1.0, 1.0, 0.25, 0.5, 0.5, 0.0)
    assert random_resized_crop_box((200, 200), (0.0, 1.0), generator) == (50, 0, 100, 100)
    assert not generator.shares


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 1000), (0, 433, 100, 133)),  # at most 4/3 as wide as high
        ((1000, 90), (440, 0, 120, 90)),  # at most 4/3 as high as wide
        ((300, 300), (0, 0, 300, 300)),
    ],
)
def test_a_crop_box_that_never_fits_is_the_middle(size, box):
    generator = Scripted(*[1.0, 1.0] * 10)  # of the area of the image, 4/3 as wide as high
    assert random_resized_crop_box(size, (0.5, 1.0), generator) == box
    assert not generator.shares


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (256, 256), (60, 40), (1000, 224)])
@pytest.mark.parametrize(("side", "crop_ratio"), [(224, 0.875), (96, 0.95), (64, 1.0)])
def test_evaluation_resizes_the_short_side_and_cuts_out_the_middle(size, side, crop_ratio):
    """By Pillow's resize and crop, one after the other, with torchvision's sizes."""
    array = picture(*size)
    short = math.floor(side / crop_ratio)
    height, width = (int(short * length / min(size)) for length in size)
    top, left = round((height - side) / 2), round((width - side) / 2)
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), int)
    transform = EvalTransform(Preprocessing(image_size=side, crop_ratio=crop_ratio, **HALF))
    example = transform({"image": array, "label": 7})
    assert example.keys() == {"image", "label"}
    assert example["label"] == 7
    assert example["image"].dtype == np.uint8
    # The filters are the same but for the rounding of their positions.
    np.testing.assert_allclose(example["image"].astype(int), expected, atol=1)


def test_crop_box_may_lie_between_pixels():
    top, left, height, width = center_crop_box((300, 400), Preprocessing(224))
    assert (height, width) == (224 * 300 / 256, 224 * 400 / 341)  # 341.33 is cut off
    assert (top, left) == (16 * 300 / 256, 58 * 400 / 341)  # 58.5 is rounded to the even


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3)])
def test_an_image_of_the_models_size_is_not_touched(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.broadcast_to(array.reshape(28, 28, -1), (28, 28, 3))
    example = {"image": array, "label": 1}
    seen = EvalTransform(Preprocessing(image_size=28, crop_ratio=0.875, **HALF))(example)["image"]
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(training(28)(example, np.random.default_rng(0))["image"], expected)


def test_encoded_images_and_arrays_are_the_same():
    array, file = picture(50, 60), io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    for transform in (
        lambda image: EvalTransform(Preprocessing(image_size=32, crop_ratio=0.9, **HALF))({"image": image, "label": 0}),
        lambda image: training(32, **EVERYTHING)({"image": image, "label": 0}, np.random.default_rng(5)),
    ):
        np.testing.assert_array_equal(transform(array)["image"], transform(file.getvalue())["image"])


def test_training_without_augmentation_is_evaluation():
    example = {"image": picture(50, 60), "label": 0}
    expected = EvalTransform(Preprocessing(image_size=32, crop_ratio=0.875, **HALF))(example)["image"]
    np.testing.assert_array_equal(training(32)(example, np.random.default_rng(0))["image"], expected)


def test_digits_keep_their_floats_and_their_stream_of_shifts():
    image = np.random.default_rng(0).random((8, 8, 3), np.float32)
    example = {"image": image, "label": np.int32(3)}
    for seed in range(20):
        seen = training(8, shift_pixels=1)(example, np.random.default_rng(seed))
        expected = 2 * random_shift(image, np.random.default_rng(seed), 1) - 1
        np.testing.assert_array_equal(seen["image"], expected)


@pytest.mark.parametrize("as_floats", [False, True])
def test_flip_is_a_mirror_image_as_often_as_asked(as_floats):
    image = picture(8, 8)
    whole = {"image": image.astype(np.float32) / 255 if as_floats else image, "label": 0}
    plain = normalize_images(whole["image"], Preprocessing(8)) if as_floats else image
    flipped = 0
    for seed in range(400):
        seen = training(8, flip=0.25)(whole, np.random.default_rng(seed))["image"]
        is_flipped = np.array_equal(seen, plain[:, ::-1])
        assert is_flipped or np.array_equal(seen, plain)
        flipped += is_flipped
    assert abs(flipped / 400 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_random_resized_crop_shows_the_box_that_is_drawn():
    image = picture(120, 160)
    top, left, height, width = random_resized_crop_box((120, 160), (0.08, 1.0), np.random.default_rng(3))
    expected = Image.fromarray(image).resize(
        (32, 32), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    seen = training(32, crop_scale=(0.08, 1.0))({"image": image, "label": 0}, np.random.default_rng(3))["image"]
    np.testing.assert_array_equal(seen, expected)


def test_randaugment_fills_with_the_mean():
    transform = train_transform(augment_of(randaugment="rand-m9-mstd0.5-inc1"), Preprocessing(8, **IMAGENET))
    assert transform.randaugment.fill == (124, 116, 104)
    assert transform.randaugment.layers == 2


def test_color_jitter_draws_each_factor_from_its_range():
    grey = Image.new("RGB", (2, 2), (100, 100, 100))  # of which contrast and saturation leave everything
    values = np.array([color_jitter(grey, np.random.default_rng(seed), 0.4).getpixel((0, 0))[0] for seed in range(500)])
    assert 60 <= values.min() <= 62
    assert 138 <= values.max() <= 140
    assert abs(values.mean() - 100) < 5 * 80 / math.sqrt(12 * 500) + 1  # rounded down
    image = Image.fromarray(picture(8, 8))
    assert len({np.asarray(color_jitter(image, np.random.default_rng(seed), 0.4)).tobytes() for seed in range(9)}) == 9
    np.testing.assert_array_equal(color_jitter(image, np.random.default_rng(0), 0.0), image)


def test_erased_boxes_have_the_areas_and_ratios_asked_for():
    boxes = np.array([random_erased_box((40, 50), np.random.default_rng(seed)) for seed in range(600)])
    assert boxes.dtype == np.int32
    top, left, height, width = boxes.T
    areas, ratios = height * width / 2000, height / width
    # Sides are rounded to whole pixels: the smallest box is of some 3 x 11.
    assert 0.015 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.345
    assert 0.25 < ratios.min() < 0.4
    assert 2.5 < ratios.max() < 4
    assert (top.min(), left.min(), (top + height).max(), (left + width).max()) == (0, 0, 40, 50)  # up to each border


def test_no_box_fits_into_a_line_of_pixels():
    assert random_erased_box((1, 50), np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


def test_erasing_is_as_often_as_asked_and_leaves_the_pixels_to_the_device():
    black = {"image": np.zeros((16, 16, 3), np.uint8), "label": 0}
    seen = [training(16, erasing=0.25)(black, np.random.default_rng(seed)) for seed in range(400)]
    assert not any(example["image"].any() for example in seen)
    erased = np.array([example["erased"] for example in seen])
    is_erased = erased.any(axis=1)
    assert (erased[is_erased, 2:] > 0).all()
    assert abs(np.mean(is_erased) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)
    assert training(16)(black, np.random.default_rng(0)).keys() == {"image", "label"}


def test_transforms_are_pickled_and_draw_from_nothing_but_their_generator():
    transform = training(24, **EVERYTHING)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    example = {"image": picture(50, 60), "label": 0}
    np.random.seed(0)
    first = transform(example, np.random.default_rng(1))["image"]
    np.random.seed(1)
    np.testing.assert_array_equal(again(example, np.random.default_rng(1))["image"], first)
    assert not np.array_equal(again(example, np.random.default_rng(2))["image"], first)
    evaluation = EvalTransform(Preprocessing(image_size=24, crop_ratio=0.9, **IMAGENET))
    assert pickle.loads(pickle.dumps(evaluation)) == evaluation


@pytest.mark.parametrize("crop_scale", [None, (0.3, 1.0)])
@pytest.mark.parametrize("size", [(8, 8), (40, 50)])
def test_floats_are_cropped_and_resized_as_eight_bits_are(size, crop_scale):
    image = picture(*size) // 2 + 64  # 8 bits are clipped between the two directions too: here is nothing to clip
    floats = {"image": image.astype(np.float32) / 255, "label": 0}
    transform = training(24, crop_scale=crop_scale)
    results = [transform(each, np.random.default_rng(0))["image"] for each in (floats, {"image": image, "label": 0})]
    assert [result.dtype for result in results] == [np.float32, np.uint8]
    results = [model_input(result, transform.preprocessing) for result in results]
    # Eight bits are rounded after each of the two directions: a level is 2 / 255 of a normalised image.
    np.testing.assert_allclose(*results, atol=1.5 * 2 / 255)


@pytest.mark.parametrize(("field", "value"), [("randaugment", "rand-inc1"), ("color_jitter", 0.4)])
def test_floats_are_not_changed_as_eight_bits(refuses, field, value):
    with refuses(f"config.augment.{field} needs images of 8 bits"):
        training(8, **{field: value})({"image": np.zeros((8, 8, 3), np.float32), "label": 0}, np.random.default_rng(0))
