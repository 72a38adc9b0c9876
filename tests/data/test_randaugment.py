import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from castling_jax.data.randaugment import OPERATIONS, RandAugment, apply_operation, parse_policy

FILL = (124, 116, 104)


def picture(height=12, width=16):
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_operations_are_timms(golden):
    """timm 1.0.31's, at some magnitudes and in both directions: which there are, their arguments, and their images.

    Where timm asks Pillow for no bits at all, which Pillow refuses, the file has what older Pillows made of it.
    """
    file = golden("timm_randaugment")
    assert {name.split("/")[0] for name in file if "/" in name} == OPERATIONS.keys()
    image, fill = Image.fromarray(file["image"]), tuple(int(value) for value in file["fill"])
    for name, operation in OPERATIONS.items():
        for row, magnitude in enumerate(file["magnitudes"]):
            expected = file[f"{name}/arguments"][row]
            argument = operation.argument(float(magnitude))
            if argument is None:
                assert np.isnan(expected).all()
            elif name in ("Color", "Contrast", "Brightness", "Sharpness"):
                np.testing.assert_array_equal([max(0.1, 1 + argument), max(0.1, 1 - argument)], expected)
            else:
                np.testing.assert_array_equal([argument, -argument if operation.signed else argument], expected)
            for negative in (False, True):
                changed = apply_operation(name, image, float(magnitude), negative, fill)
                np.testing.assert_array_equal(changed, file[f"{name}/images"][row, int(negative)], err_msg=name)


@pytest.mark.parametrize("magnitude", [0.0, 4.0, 9.0])
def test_operations_are_pillows(magnitude):
    image, share = picture(), magnitude / 10
    expected = {
        "AutoContrast": ImageOps.autocontrast(image),
        "Equalize": ImageOps.equalize(image),
        "Invert": ImageOps.invert(image),
        "Posterize": ImageOps.posterize(image, 4 - int(4 * share)),
        "Solarize": ImageOps.solarize(image, 256 - int(256 * share)),
        "Color": ImageEnhance.Color(image).enhance(1 + 0.9 * share),
        "Contrast": ImageEnhance.Contrast(image).enhance(1 + 0.9 * share),
        "Brightness": ImageEnhance.Brightness(image).enhance(1 + 0.9 * share),
        "Sharpness": ImageEnhance.Sharpness(image).enhance(1 + 0.9 * share),
        "Rotate": image.rotate(30 * share, Image.Resampling.BICUBIC, fillcolor=FILL),
    }
    for name, wanted in expected.items():
        np.testing.assert_array_equal(apply_operation(name, image, magnitude, False, FILL), wanted, err_msg=name)


def test_geometry_moves_pixels_and_fills_with_the_given_color():
    image = picture(20, 20)
    array = np.asarray(image)
    moved = np.asarray(apply_operation("TranslateX", image, 10, False, FILL))  # by 0.45 of 20 pixels, to the left
    np.testing.assert_array_equal(moved[:, :11], array[:, 9:])
    assert (moved[:, 11:] == FILL).all()
    moved = np.asarray(apply_operation("TranslateY", image, 10, True, FILL))  # down
    np.testing.assert_array_equal(moved[9:], array[:11])
    assert (moved[:9] == FILL).all()
    for name, axis in (("ShearX", 1), ("ShearY", 0)):
        line = Image.new("RGB", (20, 20))
        np.asarray(line)
        for along in range(20):
            line.putpixel((10, along) if axis == 1 else (along, 10), (255, 255, 255))
        sheared = np.asarray(apply_operation(name, line, 10, False, (0, 0, 0)), float)[..., 0]
        center = (sheared * np.indices(sheared.shape)[axis]).sum(axis) / sheared.sum(axis)
        # By 0.3 pixels a pixel, measured from the corner.
        np.testing.assert_allclose(center, 10 - 0.3 * (np.arange(20) + 0.5), atol=0.05)


def test_no_bits_left_is_black():
    assert not np.asarray(apply_operation("Posterize", picture(), 10, False, FILL)).any()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", {"magnitude": 9, "magnitude_std": 0.5, "layers": 2, "probability": 0.5}),
        ("rand-m9-n6-mstd0.5-inc1", {"magnitude": 9, "magnitude_std": 0.5, "layers": 6, "probability": 0.5}),
        ("rand-inc1", {"magnitude": 10, "magnitude_std": 0.0, "layers": 2, "probability": 0.5}),
        ("rand-p0.3-n3-inc1-mstd1-m10", {"magnitude": 10, "magnitude_std": 1, "layers": 3, "probability": 0.3}),
    ],
)
def test_policies_say_what_is_drawn(policy, expected):
    assert parse_policy(policy, FILL) == RandAugment(FILL, **expected)


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5",
        "rand-m9-inc0",
        "rand-m11-inc1",
        "rand-n0-inc1",
        "rand-p1.5-inc1",
        "rand-w0-inc1",
        "original",
        "",
    ],
)
def test_other_policies_are_refused(refuses, policy):
    with refuses("'rand-m9-mstd0.5-inc1'", repr(policy)):
        parse_policy(policy, FILL)


def recorded(monkeypatch, augment, draws):
    """(operation, magnitude, negative) of every one applied, a list for each image."""
    calls = []
    monkeypatch.setattr(
        "castling_jax.data.randaugment.apply_operation",
        lambda name, image, *rest: calls[-1].append((name, *rest[:2])) or image,
    )
    rng = np.random.default_rng(0)
    for _ in range(draws):
        calls.append([])
        augment(None, rng)
    return calls


def test_draws_are_as_the_policy_says(monkeypatch):
    draws = 4000
    calls = recorded(monkeypatch, parse_policy("rand-m9-n6-mstd0.5-inc1", FILL), draws)
    counts = np.array([len(of_image) for of_image in calls])
    # Bounds of five standard deviations.
    assert abs(counts.mean() - 3) < 5 * np.sqrt(1.5 / draws)
    assert abs(counts.var() - 1.5) < 0.2
    names, magnitudes, negative = zip(*(call for of_image in calls for call in of_image), strict=True)
    total = len(names)
    for name in OPERATIONS:
        assert abs(names.count(name) / total - 1 / 15) < 5 * np.sqrt(1 / 15 / total)
    assert abs(np.mean(negative) - 0.5) < 5 * np.sqrt(0.25 / total)
    assert max(magnitudes) == 10  # put there, two standard deviations off
    assert abs(np.mean(np.equal(magnitudes, 10)) - 0.02275) < 5 * np.sqrt(0.02275 / total)
    assert abs(np.median(magnitudes) - 9) < 5 * 1.2533 * 0.5 / np.sqrt(total)


def test_images_keep_their_size_and_are_a_function_of_the_generator():
    augment = parse_policy("rand-m9-n6-mstd0.5-inc1", FILL)
    image = picture()
    random.seed(0)
    before = random.getstate()
    results = [np.asarray(augment(image, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert random.getstate() == before
    assert results[0].shape == (12, 16, 3)
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
