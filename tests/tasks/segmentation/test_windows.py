"""Windows cover an image evenly, and their logits are joined to a mean at each of its pixels."""

import dataclasses
import io
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.segmentation.transforms import EvalTransform, TrainTransform
from castling_jax.tasks.segmentation.windows import join, join_on_host, windows_of
from tests.data.mask_files import labels
from tests.tasks.segmentation.test_transforms import PLAIN, example_of

SIZE = (16, 24)
SQUASH = Preprocessing(SIZE, **PLAIN)
SLIDE = Preprocessing(SIZE, **PLAIN | {"crop_mode": "slide"})


def joined_by_hand(logits, windows, size):
    """Each pixel's logits from its own place in each window that shows it, one pixel at a time; in float64."""
    result = np.zeros((*size, logits.shape[-1]))
    for row, column in np.ndindex(*size):
        seen = []
        for one, (top, left, height, width) in zip(np.asarray(logits, np.float64), windows, strict=True):
            down, across = (row + 0.5 - top) / height, (column + 0.5 - left) / width  # shares of the window
            if 0 <= down <= 1 and 0 <= across <= 1:
                y, x = (
                    np.clip(share * side - 0.5, 0, side - 1)
                    for share, side in zip((down, across), one.shape[:2], strict=True)
                )
                low, right = min(int(y) + 1, one.shape[0] - 1), min(int(x) + 1, one.shape[1] - 1)
                upper = one[int(y), int(x)] * (1 - x % 1) + one[int(y), right] * (x % 1)
                lower = one[low, int(x)] * (1 - x % 1) + one[low, right] * (x % 1)
                seen.append(upper * (1 - y % 1) + lower * (y % 1))
        result[row, column] = np.mean(seen, 0)
    return result


@pytest.mark.parametrize("size", [(16, 24), (32, 48), (31, 40), (9, 13), (50, 20), (7, 90), (1, 1), (360, 480)])
def test_windows_cover_the_image_and_overlap(size):
    assert windows_of(size, SQUASH) == [(0, 0, *size)]
    windows = np.array(windows_of(size, SLIDE))
    (height,), (width,) = set(windows[:, 2]), set(windows[:, 3])
    # A window is as large as possible, and nothing is squashed, to half a pixel.
    scale = min(size[0] / 16, size[1] / 24)
    assert (height, width) == (max(round(16 * scale), 1), max(round(24 * scale), 1))
    for axis in (0, 1):
        starts, length = np.unique(windows[:, axis]), windows[0, 2 + axis]
        assert starts[0] == 0
        assert starts[-1] + length == size[axis]
        steps = np.diff(starts)
        assert (steps <= max(2 / 3 * length, 1) + 1).all()
        assert len(starts) == 1 or np.ptp(steps) <= 1
        # One window less would not do.
        assert (len(starts) - 2) * 2 / 3 * length < size[axis] - length or len(starts) == 1


def test_all_windows_show_the_image_the_same_way_up():
    """A PNG may state its orientation behind the pixels; Pillow then knows it only once it has read them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 60, 3), np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(file, "png")
    content, chunk = file.getvalue(), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    end = content.index(b"IEND") - 4  # a chunk is its length, its name with its data, and their checksum
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    example = example_of(labels((16, 60))) | {"image": content[:end] + chunk + content[end:]}
    seen = EvalTransform(dataclasses.replace(SLIDE, exif=True))(example)
    assert len(seen["image"]) > 1
    for image, (top, left, height, width) in zip(seen["image"], seen["windows"].astype(int), strict=True):
        np.testing.assert_array_equal(image, pixels[top : top + height, left : left + width])


@pytest.mark.parametrize("preprocessing", [SQUASH, SLIDE], ids=["squash", "slide"])
def test_logits_are_joined_at_each_images_own_size(preprocessing):
    """Larger and smaller than the model's input; on the device, on the host, and pixel by pixel."""
    sizes = [(16, 24), (31, 40), (9, 13), (33, 11), (31, 93)]
    windows = [windows_of(size, preprocessing) for size in sizes]
    most = max(map(len, windows))
    assert most == (7 if preprocessing is SLIDE else 1)
    logits = np.random.default_rng(0).standard_normal((len(sizes), most, *SIZE, 3), np.float32)
    padded = np.array([[*one, *[(41, 0, 1, 1)] * (most - len(one))] for one in windows], np.float32)
    found = join(jnp.asarray(logits), jnp.asarray(padded), (40, 96))
    assert found.shape == (len(sizes), 40, 96, 3)
    for one, own, size, theirs in zip(logits, windows, sizes, np.asarray(found), strict=True):
        expected = joined_by_hand(one[: len(own)], own, size)
        # Positions of float32, and some roundings of numbers of order one.
        np.testing.assert_allclose(theirs[: size[0], : size[1]], expected, rtol=0, atol=3e-5)
        on_host = join_on_host(one[: len(own)], np.array(own, np.float32), size)
        np.testing.assert_allclose(on_host, expected, rtol=0, atol=3e-5)


def test_an_image_of_too_many_windows(refuses):
    assert len(windows_of((16, 1024), SLIDE)) == 64
    with refuses("an image of 1200 x 16 pixels has 75 windows, and may have 64: cut it into parts"):
        windows_of((16, 1200), SLIDE)


def test_windows_of_a_pixel():
    """An image of 3 x 2 pixels in windows of 10 x 200, which are as wide as the image and a pixel high."""
    windows = windows_of((3, 2), Preprocessing((10, 200), **PLAIN | {"crop_mode": "slide"}))
    assert windows == [(row, 0, 1, 2) for row in range(3)]


def test_windows_show_their_parts_of_the_image():
    """An image of one level a column: a window begins with the level of its first column."""
    pixels = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (20, 1))[..., None].repeat(3, -1)
    seen = EvalTransform(SLIDE)({"image": pixels})
    assert seen["image"].shape == (3, *SIZE, 3)
    assert seen["size"].tolist() == [20, 60]
    assert seen["windows"].tolist() == [[0, 0, 20, 30], [0, 15, 20, 30], [0, 30, 20, 30]]
    for image, (_, left, _, width) in zip(seen["image"].astype(float), seen["windows"], strict=True):
        centres = left + (np.arange(24) + 0.5) * width / 24 - 0.5
        # Pixels are rounded to levels; at the image's ends, the filter sees the border.
        np.testing.assert_allclose(image[8, 2:-2, 0], 4 * centres[2:-2], atol=0.51)


def test_an_example_of_few_windows_has_copies_that_do_not_count():
    example = example_of(labels((20, 30)))
    seen = EvalTransform(SLIDE, (40, 50), 3)(example)
    assert seen["image"].shape == (3, *SIZE, 3)
    assert seen["mask"].shape == (40, 50)
    np.testing.assert_array_equal(seen["image"][2], EvalTransform(SLIDE)(example)["image"][0])
    x = np.random.default_rng(0).standard_normal((3, *SIZE, 2), np.float32)
    x[1:] = 1e6
    joined = join(x[None], seen["windows"][None], (40, 50))[0, :20, :30]
    np.testing.assert_allclose(joined, join(x[None, :1], seen["windows"][None, :1], (40, 50))[0, :20, :30], atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_training_keeps_the_aspect_ratio_that_evaluation_keeps(scale):
    """A checkerboard of 16 pixels, along which the classes change as often down as across."""
    board = (np.add.outer(np.arange(64) // 16, np.arange(160) // 16) % 2).astype(np.uint8)
    transform = TrainTransform(Preprocessing((64, 64), **PLAIN | {"crop_mode": "slide"}), (scale, scale), 0.0, 0.0)
    for seed in range(5):
        mask = transform(example_of(board), np.random.default_rng(seed))["mask"]
        shown = round(64 * min(scale, 1))  # the short side; the long one goes beyond the result at any scale here
        np.testing.assert_array_equal(mask[shown:], 255)
        for line in (mask[:shown, 0], mask[0]):
            runs = np.diff(np.flatnonzero(np.diff(line.astype(int))))  # of whole squares
            np.testing.assert_allclose(runs[: len(runs) - (scale < 1)], 16 * scale, atol=1)
