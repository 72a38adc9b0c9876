import numpy as np
import scipy.ndimage

from castling_jax.data.transforms import normalize, random_shift, training_example


def test_random_shift_is_a_whole_pixel_translation():
    image = np.random.default_rng(0).random((8, 6, 3), np.float32)
    shifted = {
        scipy.ndimage.shift(image, (rows, columns, 0), order=0).tobytes()
        for rows in range(-2, 3)
        for columns in range(-2, 3)
    }
    seen = {random_shift(image, np.random.default_rng(seed), 2).tobytes() for seed in range(400)}
    assert seen == shifted  # every one of the 25 translations, and nothing else


def test_normalize_maps_the_unit_interval_to_plus_minus_one():
    np.testing.assert_array_equal(normalize(np.float32([0, 0.5, 1])), [-1, 0, 1])


def test_training_example_without_shift_only_normalizes():
    image = np.random.default_rng(0).random((4, 4, 3), np.float32)
    example = training_example({"image": image, "label": 3}, np.random.default_rng(0), shift_pixels=0)
    np.testing.assert_array_equal(example["image"], 2 * image - 1)
    assert example["label"] == 3
