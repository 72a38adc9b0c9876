import numpy as np
import pytest

from castling_jax.data.sources import DIGITS_SPLITS, load_dataset
from castling_jax.ops.errors import InputError


@pytest.mark.parametrize(("split", "size"), [("train", 1437), ("test", 360), ("minitrain", 1149), ("minival", 288)])
def test_digits_are_grey_images_in_three_channels(split, size):
    dataset = load_dataset("digits", split)
    assert len(dataset) == size
    assert dataset.images.shape == (size, 8, 8, 3)
    assert dataset.images.dtype == np.float32
    assert dataset.images.min() == 0
    assert dataset.images.max() == 1
    np.testing.assert_array_equal(dataset.images[..., 0], dataset.images[..., 2])
    assert set(dataset.labels) == set(range(dataset.num_classes))


@pytest.mark.parametrize(("whole", "part"), [("train", "test"), ("minitrain", "minival")])
def test_held_out_fifth_is_stratified(whole, part):
    large, small = (np.bincount(load_dataset("digits", split).labels) for split in (whole, part))
    # Rounding to whole images moves each class by less than one.
    np.testing.assert_array_less(np.abs(small - (large + small) / 5), 1)


def test_splits_are_disjoint_and_complete():
    def images_of(split):
        return {image.tobytes() for image in load_dataset("digits", split).images}

    images = {split: images_of(split) for split in DIGITS_SPLITS}
    assert not images["train"] & images["test"]
    assert not images["minitrain"] & images["minival"]
    assert images["minitrain"] | images["minival"] == images["train"]


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown dataset 'digit': did you mean 'digits'"):
        load_dataset("digit", "train")
    with pytest.raises(InputError, match="unknown split of digits 'tset': did you mean 'test'"):
        load_dataset("digits", "tset")
