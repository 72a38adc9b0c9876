"""Images that the device finishes: uint8 pixels train and evaluate as floats that the host has normalised."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from castling_jax.data.arrays import ArrayDataset
from castling_jax.data.sources import load_dataset
from castling_jax.models.registry import create_model
from castling_jax.normalization import model_input, normalize_images
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.task import Classification
from castling_jax.tasks.detection.task import Detection
from castling_jax.tasks.images import _channel_bits, _normal, erase, finish_images
from castling_jax.tasks.reconstruction.task import Reconstruction
from castling_jax.tasks.segmentation.task import Segmentation
from castling_jax.training import step as step_module
from castling_jax.training.evaluate import make_evaluator
from castling_jax.training.sharding import make_mesh
from castling_jax.training.state import create_state
from castling_jax.training.step import make_train_step, prepare_batch
from tests.data.box_files import coco_content, write_coco
from tests.data.mask_files import VOID, write_masks
from tests.models import small
from tests.models.test_segmenter import small_segmenter
from tests.tasks.detection import meshes
from tests.tasks.detection.test_task import detect_by_brightness
from tests.tasks.detection.test_task import task as detection_task
from tests.tasks.segmentation.test_task import segment_by_colour
from tests.training.test_sharding import SIZES

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREPROCESSING = Preprocessing(8, **IMAGENET)  # the size is the transforms' business


def pixels_of(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# One batch.


def test_pixels_are_normalised_and_floats_stay():
    pixels = jnp.asarray(pixels_of(2, 5, 4))
    expected = (np.asarray(pixels, np.float64) / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    batch = {"image": pixels, "label": jnp.arange(2)}
    for finish in (finish_images, jax.jit(finish_images, static_argnums=1)):
        found = finish(batch, PREPROCESSING)
        assert found["image"].dtype == jnp.float32
        # Three roundings of float32 of numbers up to 2.6, and one of a reciprocal in the place of a divisor.
        np.testing.assert_allclose(found["image"], expected, rtol=0, atol=1e-6)
        assert found["label"].tolist() == [0, 1]
    for dtype in (jnp.float32, jnp.bfloat16):
        floats = jnp.asarray(expected, dtype)
        for preprocessing in (None, PREPROCESSING):
            assert finish_images({"image": floats}, preprocessing)["image"] is floats


def test_pixels_that_nothing_can_normalise_are_refused(refuses):
    batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8), "label": jnp.arange(2)}
    model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32)
    state = create_state(small.random_variables(model), optax.sgd(1.0), seed=0)
    step = make_train_step(model, optax.sgd(1.0), Classification(10))
    with refuses("the images are uint8, and nothing says how to normalise them", "give make_train_step"):
        step(state, batch, 1.0)
    dataset = ArrayDataset(np.asarray(batch["image"]), np.arange(2), 10)
    evaluate = make_evaluator(
        model, dataset, Classification(10), transform=dict, batch_size=2, mesh=make_mesh(SIZES), preprocessing=None
    )
    with refuses("the images are uint8, and nothing says how to normalise them"):
        evaluate(state.variables, 1.0)
    with refuses("images must be uint8, or floats in [0, 1], not int32."):
        finish_images({"image": jnp.zeros((2, 8, 8, 3), jnp.int32)}, PREPROCESSING)


def test_beyond_what_an_image_fills_are_zeros():
    pixels, filled = jnp.asarray(pixels_of(3, 6, 7)), np.int32([[6, 7], [4, 7], [2, 3]])
    found = finish_images({"image": pixels, "filled": jnp.asarray(filled)}, PREPROCESSING)
    assert found.keys() == {"image"}
    expected = np.array(model_input(pixels, PREPROCESSING))
    for image, (height, width) in zip(expected, filled, strict=True):
        image[height:], image[:, width:] = 0, 0
    np.testing.assert_array_equal(found["image"], expected)


def test_erasing_puts_normal_noise_into_the_boxes_and_leaves_the_rest():
    images = jnp.asarray(normalize_images(pixels_of(64, 24, 30), PREPROCESSING))
    rng = np.random.default_rng(1)
    sides = rng.integers(1, 15, (64, 2))
    boxes = np.concatenate([rng.integers((24, 30) - sides + 1), sides], axis=1).astype(np.int32)
    boxes[::4] = 0  # nothing is erased
    noise = []
    key = jax.random.key(3)
    erased = np.asarray(jax.jit(erase)(images, boxes, key))
    for before, after, (top, left, height, width) in zip(np.asarray(images), erased, boxes, strict=True):
        inside = np.zeros((24, 30), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(after[~inside], before[~inside])
        noise.append(after[inside])
    every = np.concatenate(noise).ravel()
    assert every.size > 5000
    # Five standard deviations of the mean, the deviation, the skewness and the kurtosis of normal numbers.
    assert abs(every.mean()) < 5 / math.sqrt(every.size)
    assert abs(every.std() - 1) < 5 / math.sqrt(2 * every.size)
    assert abs(np.mean(every**3)) < 5 * math.sqrt(15 / every.size)
    assert abs(np.mean(every**4) - 3) < 5 * math.sqrt(96 / every.size)
    # Channels, images and keys have noise of their own.
    assert abs(np.corrcoef(np.concatenate(noise).T) - np.eye(3)).max() < 5 / math.sqrt(every.size / 3)
    assert len(np.unique(every)) > 0.99 * every.size
    # float32 has so few numbers that two draws may be equal.
    assert np.isin(np.asarray(erase(images, boxes, jax.random.key(4)))[erased != images], every).mean() < 0.01


def test_each_random_bit_of_a_pixel_goes_into_one_channel():
    """All but one of the 64: a channel has 21."""
    words = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
    before = np.asarray(_channel_bits(*words))
    assert (before < 2**21).all()
    changed = []
    for word, bit in np.ndindex(2, 32):
        flipped = words.copy()
        flipped[word] ^= np.uint32(1 << bit)
        difference = before ^ np.asarray(_channel_bits(*flipped))
        changed += [(int(channel), int(difference[channel])) for channel in np.flatnonzero(difference)]
    assert sorted(changed) == [(channel, 1 << bit) for channel in range(3) for bit in range(21)]


def test_noise_is_finite_and_normal_whatever_the_bits():
    bits = np.array([0, 2**20 - 1, 2**20, 2**21 - 1, 1234567], np.uint32)
    expected = scipy.stats.norm.ppf((bits + 0.5) / 2**21)
    # XLA's erf_inv is a polynomial in float32; in the tails an error of its argument counts a hundred times.
    np.testing.assert_allclose(_normal(jnp.asarray(bits)), expected, rtol=2e-5)


def test_noise_depends_on_the_key_and_the_row_of_the_whole_batch_alone():
    images, boxes = jnp.zeros((8, 6, 6, 3)), jnp.tile(jnp.int32([0, 0, 6, 6]), (8, 1))
    whole = erase(images, boxes, jax.random.key(0))
    np.testing.assert_array_equal(erase(images[:3], boxes[:3], jax.random.key(0)), whole[:3])
    # An example's box does not change its neighbours' noise.
    other = boxes.at[2].set(jnp.int32([1, 1, 2, 3]))
    np.testing.assert_array_equal(erase(images, other, jax.random.key(0))[3:], whole[3:])


def test_erasing_draws_anew_each_step_and_mixing_draws_as_without_it():
    batch = {"image": jnp.zeros((4, 8, 8, 3), jnp.uint8), "label": jnp.arange(4)}
    task = Classification(10, mixing={"mixup": 0.8, "cutmix": 0.0, "switch": 0.5, "probability": 1.0})
    boxes = jnp.tile(jnp.int32([2, 2, 4, 4]), (4, 1))

    def prepared(batch, number):
        return prepare_batch(task, batch, jax.random.key(number), jnp.int32(0), preprocessing=PREPROCESSING)

    first, again, second = (prepared(batch | {"erased": boxes}, number) for number in (0, 0, 1))
    np.testing.assert_array_equal(first["image"], again["image"])
    np.testing.assert_array_equal(first["target"], prepared(batch, 0)["target"])
    # In the boxes alone; elsewhere, mixing two equal colours rounds.
    assert ((abs(first["image"] - second["image"]) > 1e-5).any(-1).sum((1, 2)) == 16).all()


# ---------------------------------------------------------------------------------------------------------------------
# Each task's step.


def classification():
    task = Classification(10, 0.1, {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "probability": 1.0}, erases=True)
    batch = {"image": pixels_of(6, 8, 8), "label": np.arange(6), "erased": np.int32([[1, 2, 3, 4], [0] * 4] * 3)}
    return create_model("deit_micro", num_classes=10, depth=1, embed_dim=32), task, batch


def reconstruction():
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = create_model("mae", backbone="deit_micro", image_size=16, backbone_arguments={"depth": 1}, **decoder)
    return model, Reconstruction(patch_size=2, norm_pix_loss=False), {"image": pixels_of(4, 16, 16)}


def segmentation():
    filled = np.int32([[40, 72], [20, 72], [40, 30]])
    mask = np.random.default_rng(1).integers(0, 5, (3, 40, 72)).astype(np.uint8)
    batch = {"image": pixels_of(3, 40, 72), "mask": mask, "filled": filled}
    return small_segmenter("deit_micro"), Segmentation(num_classes=5, dice=0.5, exif=False), batch


def detection():
    """Linear layers stand in for a detector, whose gradients take half a minute to compile."""
    batch = {name: array[:4] for name, array in meshes.examples().items()}
    task = detection_task(num_classes=meshes.CLASSES, tal_step=1, legacy=False, max_boxes=meshes.BOXES)
    return None, task, batch | {"image": pixels_of(4, meshes.SIZE, meshes.SIZE)}


# They take long to compile.
SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (classification, reconstruction, segmentation)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [*SLOW, detection])
def test_a_step_from_pixels_is_the_step_from_normalised_floats(make, monkeypatch):
    model, task, batch = make()
    if model is None:
        monkeypatch.setattr(step_module, "forward_train", meshes.forward_train)
    variables = jax.tree.map(np.float32, meshes.variables() if model is None else small.random_variables(model))
    optimizer = optax.sgd(1.0)  # what the parameters lose is the gradient
    step = make_train_step(model, optimizer, task, preprocessing=PREPROCESSING)
    floats = batch | {"image": normalize_images(batch["image"], PREPROCESSING)}
    results = []
    for examples in (batch, floats):
        state = create_state(jax.tree.map(jnp.array, variables), optimizer, seed=0)
        results.append(step(state, examples, 1.0))
    (found, metrics), (expected, expected_metrics) = results
    # The inputs differ by a rounding of 1e-7 of their size, which the models, of order one, hand on to their losses.
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected.params))
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5, atol=1e-5 * largest)


# ---------------------------------------------------------------------------------------------------------------------
# Each task's evaluation.


def labelled(tmp_path):
    dataset = ArrayDataset(pixels_of(5, 8, 8), np.arange(5), 10)
    return create_model("deit_micro", num_classes=10, depth=1), Classification(10), dataset, PREPROCESSING, None


def unlabelled(tmp_path):
    model, task, _ = reconstruction()
    return model, task, ArrayDataset(pixels_of(5, 16, 16), np.arange(5), 10), Preprocessing(16, **IMAGENET), None


def masked(tmp_path):
    dataset = load_dataset(f"masks:{write_masks(tmp_path)}", "train", ignore_label=VOID)
    preprocessing = Preprocessing((16, 24), crop_mode="slide", crop_ratio=1.0, **IMAGENET)
    return small.small_model(), Segmentation(3, 0.0, False), dataset, preprocessing, segment_by_colour


def boxed(tmp_path):
    content = coco_content()
    content["categories"].append({"id": 91, "name": "yak"})
    dataset = load_dataset(f"coco:{write_coco(tmp_path, content=content)}", "train2017")
    preprocessing = Preprocessing(160, crop_mode="squash", crop_ratio=1.0, **IMAGENET)
    return small.small_model(), detection_task(num_classes=4), dataset, preprocessing, detect_by_brightness


@dataclasses.dataclass(frozen=True)
class OnTheHost:
    """A transform whose images the host normalises too."""

    transform: object
    preprocessing: Preprocessing

    def __call__(self, example):
        result = self.transform(example)
        assert result["image"].dtype == np.uint8
        return result | {"image": normalize_images(result["image"], self.preprocessing)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [labelled, unlabelled, masked, boxed])
def test_an_evaluation_of_pixels_is_the_one_of_normalised_floats(make, tmp_path, monkeypatch):
    model, task, dataset, preprocessing, apply = make(tmp_path)
    if apply is not None:
        monkeypatch.setattr("castling_jax.training.evaluate.apply", apply)
    transform = task.split_transform(preprocessing, dataset)
    options = {"batch_size": 4, "mesh": make_mesh(SIZES)}
    found, expected = (
        make_evaluator(model, dataset, task, **options, **how)(small.random_variables(model), 1.0).figures()
        for how in (
            {"transform": transform, "preprocessing": preprocessing},
            {"transform": OnTheHost(transform, preprocessing)},
        )
    )
    # Sums of float32 numbers of order one whose inputs differ by a rounding; accuracies are shares of few images.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_all_tasks_are_tested():
    tasks = {type(make()[1]) for make in (classification, reconstruction, segmentation, detection)}
    assert tasks == {Classification, Reconstruction, Segmentation, Detection}
