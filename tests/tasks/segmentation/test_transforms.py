"""The mask stays under its image: scaled, cropped, padded and flipped together."""

import pickle

import numpy as np
import pytest

from castling_jax.data.masks import IGNORED, INVALID, table_of
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.images import finish_images
from castling_jax.tasks.segmentation.transforms import EvalTransform, TrainTransform, train_transform
from castling_jax.training.config import default_config
from tests.data.mask_files import labels, png

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_mode": "squash", "crop_ratio": 1.0}


def example_of(mask, classes=3):
    """An image whose red channel is its mask, 60 levels a class."""
    pixels = np.zeros((*mask.shape, 3), np.uint8)
    pixels[..., 0] = 20 + 60 * np.minimum(mask, 3)
    return {"image": png(pixels), "mask": png(mask), "table": table_of(range(classes), 11)}


def transform(size=(32, 48), scale_range=None, flip=0.0, distort=0.0):
    return TrainTransform(Preprocessing(size, **PLAIN), scale_range, flip, distort)


def finished(result, preprocessing):
    """A transformed example's image as the device finishes it."""
    batch = {name: array[None] for name, array in result.items()}
    return np.asarray(finish_images(batch, preprocessing)["image"][0])


def classes_in(image):
    """The classes that the image shows, where no two of them are mixed; and whether a pixel is beyond the image."""
    red = 255 * np.asarray(image)[..., 0]
    nearest = np.round((red - 20) / 60)
    return nearest, np.abs(red - 20 - 60 * nearest) < 2, red == 0


def test_without_augmentation_the_pixels_are_the_images_own():
    mask = labels((32, 48))
    example = example_of(mask)
    result = transform()(example, np.random.default_rng(0))
    assert {name: (x.shape, x.dtype) for name, x in result.items()} == {
        "image": ((32, 48, 3), np.uint8),
        "filled": ((2,), np.int32),
        "mask": ((32, 48), np.uint8),
    }
    np.testing.assert_array_equal(result["mask"], np.where(mask == 11, IGNORED, mask))
    np.testing.assert_array_equal(result["image"][..., 0], 20 + 60 * np.minimum(mask, 3))
    assert result["filled"].tolist() == [32, 48]


@pytest.mark.parametrize("scale_range", [(0.5, 2.0), (0.5, 0.5), (2.0, 2.0), (0.3, 0.9)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_mask_and_image_move_together(scale_range, flip):
    """Blocks of 16 pixels, so that most pixels are no mixture; wherever the image shows one class, the mask has it."""
    blocks = np.random.default_rng(1).integers(0, 4, (8, 6)).astype(np.uint8)
    blocks[blocks == 3] = 11
    mask = blocks.repeat(16, 0).repeat(16, 1)
    example = example_of(mask)
    padded = []
    for seed in range(12):
        result = transform((64, 80), scale_range, flip)(example, np.random.default_rng(seed))
        shown, is_pure, is_beyond = classes_in(finished(result, Preprocessing((64, 80), **PLAIN)))
        expected = np.where(is_beyond | (shown == 3), IGNORED, shown)
        agree = (result["mask"] == expected)[is_pure | is_beyond]
        # The nearest pixel may be the neighbour's at a block's very edge, where bicubic pixels can look pure.
        assert agree.mean() > 0.98
        assert (is_pure | is_beyond).mean() > 0.5
        padded.append(is_beyond.mean())
        if scale_range[1] < 1:  # what is beyond the image is on the right and at the bottom
            height, width = (np.flatnonzero(~is_beyond.all(axis)).max() + 1 for axis in (1, 0))
            assert not is_beyond[:height, :width].any()
    assert (max(padded) > 0) == (scale_range[0] < 1)


@pytest.mark.parametrize("as_floats", [False, True])
def test_beyond_a_small_image_is_exactly_the_mean_colour(as_floats):
    """Which is 0 after the normalisation, and which 8 bits could not hold: 0.485 x 255 is no level."""
    preprocessing = Preprocessing((32, 48), **PLAIN | {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    mask = labels((90, 70))
    example = example_of(mask)
    if as_floats:
        example["image"] = np.full((90, 70, 3), 0.25, np.float32)
    drawn = TrainTransform(preprocessing, (0.4, 0.7), 0.5, 0.0)
    for seed in range(10):
        result = drawn(example, np.random.default_rng(seed))
        image, (height, width) = finished(result, preprocessing), result["filled"].tolist()
        assert 32 * 0.4 - 1 <= height <= 32 * 0.7 + 1
        assert 48 * 0.4 - 1 <= width <= 48 * 0.7 + 1
        assert image[:height, :width].all()
        assert not image[height:].any()
        assert not image[:, width:].any()


def test_at_scale_one_training_sees_what_evaluation_sees():
    example = example_of(labels((90, 70)))
    trained = transform((32, 48), (1.0, 1.0))(example, np.random.default_rng(0))
    evaluated = EvalTransform(Preprocessing((32, 48), **PLAIN), (100, 80))(example)
    np.testing.assert_array_equal(trained["image"], evaluated["image"])


def test_draws_differ_and_repeat():
    example = example_of(labels((64, 64)))
    drawn = transform(scale_range=(0.5, 2.0), flip=0.5, distort=0.5)
    copy = pickle.loads(pickle.dumps(drawn))
    results = [drawn(example, np.random.default_rng(seed)) for seed in range(4)]
    for seed, result in enumerate(results):
        again = copy(example, np.random.default_rng(seed))
        for name, array in result.items():
            np.testing.assert_array_equal(again[name], array)
    assert len({result["mask"].tobytes() for result in results}) == 4


def test_evaluation_keeps_the_masks_size():
    mask = labels((20, 30))
    result = EvalTransform(Preprocessing((32, 48), **PLAIN), (40, 50))(example_of(mask))
    assert result["image"].shape == (32, 48, 3)
    assert result["size"].tolist() == [20, 30]
    assert result["mask"].shape == (40, 50)
    np.testing.assert_array_equal(result["mask"][:20, :30], np.where(mask == 11, IGNORED, mask))
    assert (result["mask"][20:] == IGNORED).all()
    assert (result["mask"][:, 30:] == IGNORED).all()
    without = EvalTransform(Preprocessing((32, 48), **PLAIN))({"image": example_of(mask)["image"]})
    assert without.keys() == {"image", "windows", "size"}


def test_wrong_masks_are_refused(refuses):
    example = example_of(labels((20, 30)))
    for run in (
        lambda example: transform()(example, np.random.default_rng(0)),
        EvalTransform(Preprocessing((32, 48), **PLAIN), (40, 50)),
    ):
        with refuses("the mask has 28 x 20 pixels, but its image has 30 x 20."):
            run(example | {"mask": png(labels((20, 28)))})
        with refuses("the mask has the label 9, but the classes have the labels 0 to 2"):
            run(example | {"mask": png(np.full((20, 30), 9, np.uint8))})
    assert INVALID < IGNORED


def test_fields_come_from_the_configuration(refuses):
    augment = default_config().augment
    preprocessing = Preprocessing(32, **PLAIN)
    assert train_transform(augment, preprocessing) == TrainTransform(preprocessing, None, 0.0, 0.0)
    augment.update(scale_range=[0.5, 2.0], flip=0.5, distort=0.25)
    assert train_transform(augment, preprocessing) == TrainTransform(preprocessing, (0.5, 2.0), 0.5, 0.25)
