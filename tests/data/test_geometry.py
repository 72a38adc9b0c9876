import numpy as np
import pytest
from PIL import Image, ImageDraw

from castling_jax.data.geometry import View, evaluation_view
from castling_jax.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(32)
VIEWS = {
    "whole": View((0, 0, 60, 80), (60, 80)),
    "corner": View((0, 0, 50, 60), (50, 60)),
    "crop": View((10, 20, 30, 40), (60, 80)),
    "fractions": View((3.25, 7.5, 48.5, 61.25), (97, 49)),
    "flipped": View((10, 5, 40, 60), (80, 120), flip=True),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("as_floats", [False, True])
def test_boxes_move_as_the_image_does(name, as_floats):
    """A white rectangle is drawn into the image; where the view shows it is read off the pixels."""
    view = VIEWS[name]
    picture = Image.new("RGB", (80, 60))
    ImageDraw.Draw(picture).rectangle((24, 16, 39, 35), fill="white")  # the pixels of the box 24, 16 to 40, 36
    image = np.asarray(picture)
    seen = np.asarray(view.image(image.astype(np.float32) / 255 if as_floats else image, PREPROCESSING), np.float64)
    seen = seen[..., 0] / seen.max()
    (moved,) = view.boxes(np.float32([[24, 16, 40, 36]]))
    # A pixel at the edge counts by its share; the antialiasing filter overshoots, which evens out but for clipping.
    width, height = seen.max(0).sum(), seen.max(1).sum()
    assert moved[2] - moved[0] == pytest.approx(width, abs=0.6)
    assert moved[3] - moved[1] == pytest.approx(height, abs=0.6)
    centers = (np.arange(seen.shape[1]) + 0.5, np.arange(seen.shape[0]) + 0.5)
    middle = [(seen.sum(axis) * center).sum() / seen.sum() for axis, center in zip((0, 1), centers, strict=True)]
    np.testing.assert_allclose([(moved[0] + moved[2]) / 2, (moved[1] + moved[3]) / 2], middle, atol=0.1)
    assert moved.dtype == np.float32


@pytest.mark.parametrize("name", VIEWS)
def test_a_mask_is_what_the_image_shows_and_mixes_no_labels(name):
    view = VIEWS[name]
    labels = np.zeros((60, 80), np.uint8)
    labels[16:36, 24:40], labels[40:50, 50:70] = 7, 255
    seen = view.mask(labels)
    assert set(np.unique(seen)) <= {0, 7, 255}
    assert seen.shape == view.size
    # The mask's region of a label is that label's box; its edges are rounded to whole pixels.
    rows, columns = np.nonzero(seen == 7)
    (moved,) = view.boxes(np.float32([[24, 16, 40, 36]]))
    np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], moved, atol=0.51)


def test_a_view_without_a_change_gives_what_it_got():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    view = VIEWS["whole"]
    np.testing.assert_array_equal(view.image(image, PREPROCESSING), image)
    np.testing.assert_array_equal(view.mask(image[..., 0]), image[..., 0])
    boxes = np.random.default_rng(1).uniform(0, 60, (5, 4)).astype(np.float32)
    np.testing.assert_array_equal(view.boxes(boxes), boxes)


@pytest.mark.parametrize("as_floats", [False, True])
def test_the_corner_of_a_larger_image_is_cut_out(as_floats):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    image = image.astype(np.float32) / 255 if as_floats else image
    np.testing.assert_allclose(VIEWS["corner"].image(image, PREPROCESSING), image[:50, :60], atol=1e-6)


def test_twice_mirrored_boxes_are_the_boxes():
    view = View((0, 0, 60, 80), (60, 80), flip=True)
    boxes = np.float32([[1, 2, 3, 4], [0, 0, 80, 60]])
    np.testing.assert_allclose(view.boxes(view.boxes(boxes)), boxes, atol=1e-5)
    assert view.boxes(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_evaluation_sees_all_of_an_image_of_the_models_size():
    assert evaluation_view((32, 32), PREPROCESSING) == View((0, 0, 32, 32), (32, 32))
    assert evaluation_view((64, 64), PREPROCESSING).box != (0, 0, 64, 64)  # the middle, by crop_ratio


@pytest.mark.parametrize(
    "mode, expected",
    [
        # 300 x 400 covers 100 / 0.5 x 100 / 0.5 at 200 x 266: the middle 100 rows of 200, and 100 columns of 266.
        ("center", (75.0, 83 * 400 / 266, 150.0, 100 * 400 / 266)),
        ("squash", (75.0, 100.0, 150.0, 200.0)),
    ],
)
def test_evaluation_cuts_out_the_center_in_either_mode(mode, expected):
    view = evaluation_view((300, 400), Preprocessing(100, crop_ratio=0.5, crop_mode=mode))
    np.testing.assert_allclose(view.box, expected)


def test_a_size_that_is_not_square_is_covered():
    # 100 x 300 covers 80 x 60 at 80 x 240.
    view = evaluation_view((100, 300), Preprocessing((80, 60), crop_ratio=1.0))
    assert view == View((0.0, 90 * 300 / 240, 100.0, 60 * 300 / 240), (80, 60))


def test_squash_without_a_crop_sees_the_whole_image():
    preprocessing = Preprocessing((80, 60), crop_ratio=1.0, crop_mode="squash")
    assert evaluation_view((100, 300), preprocessing) == View((0.0, 0.0, 100.0, 300.0), (80, 60))
