import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from castling_jax.data.decode import decode, image_size, read_crop


def smooth(height, width, seed=0):
    """A picture without sharp edges, uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("GIF", "P")]
)
def test_size_is_in_the_header(kind, mode):
    whole = encoded(smooth(240, 230), kind, mode)
    assert image_size(whole) == (240, 230)
    assert image_size(whole[: len(whole) // 2]) == (240, 230)  # what follows is not read


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_arrays_are_images_too(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert image_size(array) == (5, 4)
    expected = np.broadcast_to(array.reshape(5, 4, -1), (5, 4, 3))
    np.testing.assert_array_equal(decode(array), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_every_kind_of_pixel_becomes_rgb(mode):
    image = smooth(20, 30)
    data = encoded(image, "PNG", mode)
    decoded = decode(data)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(decoded, Image.fromarray(image).convert(mode).convert("RGB"))


def test_print_colors_become_rgb():
    image = smooth(20, 30)
    decoded = decode(encoded(image, "JPEG", "CMYK", quality=95))
    # By the plain formula, and JPEG's own loss.
    np.testing.assert_allclose(np.asarray(decoded, int), image, atol=12)


def test_sixteen_bits_keep_their_upper_eight():
    image = np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(decode(file.getvalue()))[..., 1], image // 256)


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = encoded(smooth(20, 30), exif=exif)
    assert image_size(turned) == (20, 30)
    np.testing.assert_array_equal(decode(turned), decode(encoded(smooth(20, 30))))


def ramp(height, width):
    """Red grows by 200 from left to right, green from top to bottom."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([20 + 200 * (columns + 0.5) / width, 20 + 200 * (rows + 0.5) / height, 0 * rows], axis=-1)
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 375, 500), (28, 28)),  # an eighth of the size is read
        ((10, 21, 161, 99), (32, 24)),  # a quarter
        ((64.5, 33.25, 120.5, 130.75), (50, 60)),  # a half
        ((200, 301, 100, 150), (100, 150)),  # as it is
        ((300, 400, 75, 100), (150, 160)),  # enlarged
    ],
)
def test_crop_shows_what_is_in_its_box(kind, box, size):
    crop = np.asarray(read_crop(encoded(ramp(375, 500), kind), box, size), float)
    assert crop.shape == (*size, 3)
    top, left, height, width = box
    rows = 20 + 200 * (top + (np.arange(size[0]) + 0.5) * height / size[0]) / 375
    columns = 20 + 200 * (left + (np.arange(size[1]) + 0.5) * width / size[1]) / 500
    # The border is left out: there a filter is cut off. A JPEG is rounded to whole values and coefficients; a shift
    # by one pixel of the image would be 0.4 or 0.5.
    off = (crop - np.stack(np.broadcast_arrays(columns, rows[:, None], 0), axis=-1))[3:-3, 3:-3, :2]
    assert np.abs(off.mean((0, 1))).max() < 0.2
    assert np.abs(off.mean(0)).max() < 2
    assert np.abs(off.mean(1)).max() < 2


@pytest.mark.parametrize(
    ("box", "decoded_size"),
    [
        ((0, 0, 375, 500), (47, 63)),  # an eighth of the sides, rounded up
        ((0, 0, 239, 320), (94, 125)),
        ((0, 0, 119, 240), (188, 250)),
        ((0, 0, 59, 500), (375, 500)),
    ],
)
def test_jpeg_is_read_no_larger_than_the_crop_needs(monkeypatch, box, decoded_size):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *a, **k: sizes.append(image.size) or resize(image, *a, **k)
    )
    data = encoded(smooth(375, 500))
    sizes.clear()
    read_crop(data, box, (30, 40))
    assert sizes == [decoded_size[::-1]]


def test_crop_is_pillows_crop_and_resize_but_at_its_edges():
    image = smooth(100, 120)
    crop = np.asarray(read_crop(encoded(image, "PNG"), (11, 23, 60, 80), (30, 40)), int)
    expected = Image.fromarray(image).crop((23, 11, 103, 71)).resize((40, 30), Image.Resampling.BICUBIC)
    # Bicubic filters, here four pixels wide to each side, reach over the edge by two pixels of the result.
    np.testing.assert_array_equal(crop[2:-2, 2:-2], np.asarray(expected, int)[2:-2, 2:-2])
    assert np.abs(crop - np.asarray(expected, int)).max() < 12


def test_interpolation_is_as_named():
    image = smooth(100, 120)
    bilinear = read_crop(image, (0, 0, 100, 120), (20, 30), "bilinear")
    np.testing.assert_array_equal(bilinear, Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_cut_off_is_refused(refuses, kind):
    data = encoded(smooth(200, 300), kind)
    for read in (decode, lambda image: read_crop(image, (0, 0, 200, 300), (10, 10))):
        with refuses("an image cannot be decoded: "):
            read(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8\xff"])
@pytest.mark.parametrize("read", [decode, image_size])
def test_what_is_no_image_is_refused(refuses, data, read):
    with refuses("an image cannot be decoded: "):
        read(data)


def test_floating_point_pixels_are_refused(refuses):
    file = io.BytesIO()
    Image.fromarray(np.ones((3, 4), np.float32)).save(file, "TIFF")
    with refuses("an image cannot be decoded: its pixels are floating-point numbers."):
        decode(file.getvalue())


@pytest.mark.parametrize("array", [np.zeros((3, 4)), np.zeros((3, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)])
def test_arrays_of_another_form_are_refused(refuses, array):
    with refuses("uint8 [height, width] or [height, width, 1 or 3]", str(array.dtype), str(list(array.shape))):
        decode(array)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("reduced", [False, True])
def test_an_upright_crop_of_a_turned_jpeg(orientation, reduced):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(smooth(400, 480), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert image_size(data, exif=True) == upright.shape[:2]
    np.testing.assert_array_equal(decode(data, exif=True), upright)
    box = (40, 80, 240, 300)
    crop = np.asarray(read_crop(data, box, (50, 60), exif=True, reduced=reduced), int)
    expected = np.asarray(read_crop(upright, box, (50, 60)), int)
    # Decoded whole, the same pixels go in; a quarter's turn changes the order of the two passes, each rounded.
    assert np.abs(crop - expected).max() <= (6 if reduced else 1)


def test_a_jpeg_decoded_whole_gives_the_pixels_of_pillow():
    data = encoded(smooth(600, 800))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    expected = whole.resize((50, 60), Image.Resampling.BICUBIC, box=(10, 20, 510, 520))
    np.testing.assert_array_equal(read_crop(data, (20, 10, 500, 500), (60, 50), reduced=False), expected)
    assert np.any(np.asarray(read_crop(data, (20, 10, 500, 500), (60, 50))) != np.asarray(expected))


@pytest.mark.parametrize("value", [200, 100_000, -1])
def test_integers_of_32_bits_have_no_range(refuses, value):
    for read in (decode, lambda image: read_crop(image, (0, 0, 4, 4), (2, 2))):
        with refuses("an image cannot be decoded: its pixels are integers of 32 bits, whose range is not known."):
            read(encoded(np.full((4, 4), value, np.int32), "TIFF", "I"))


def test_twelve_bits_are_not_taken_for_sixteen(refuses):
    # A TIFF of one strip, 2 x 2 pixels of 12 bits, written by hand: Pillow writes none.
    entries = [(256, 3, 2), (257, 3, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 2)]
    entries += [(279, 4, 6)]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    data = struct.pack("<2sHI", b"II", 42, 14) + b"\xff" * 6 + directory + struct.pack("<I", 0)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    with refuses("its pixels have 12 bits"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_sixteen_bits_the_upper_eight_are_kept(kind):
    pixels = np.array([[0, 255, 256], [511, 40_000, 65_535]], np.uint16)
    seen = np.asarray(decode(encoded(pixels, kind, "I;16")))
    np.testing.assert_array_equal(seen, np.repeat((pixels >> 8)[..., None], 3, -1))
