"""Predictions are the evaluation's numbers, for images of any kind and number."""

import numpy as np
import pytest
from PIL import Image

import castling_jax
from castling_jax.convert.inference_folder import save_inference
from castling_jax.convert.weights import read
from castling_jax.predictions import mean_features, predict, predictions_of, stream, stream_predictions
from castling_jax.preprocessing import Preprocessing
from tests.models import small

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
PREPROCESSING = Preprocessing(8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    model = small.small_model()
    save_inference(folder, model, small.random_variables(model), preprocessing=PREPROCESSING, classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 37 images of several sizes and depths of folders, more than a batch."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(37):
        folder = root / f"{number % 3}" / ("deep" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (9 + number % 4, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (root / "notes.txt").write_text("none")
    return root


def expected(weights, files):
    """By the public functions, one image at a time, with a softmax in float64."""
    read_weights = read(weights)
    for file in files:
        pixels = castling_jax.preprocess(file, read_weights.preprocessing)
        logits = np.asarray(castling_jax.apply(read_weights.model, read_weights.variables, pixels), np.float64)[0]
        shares = np.exp(logits - logits.max())
        yield shares / shares.sum()


@pytest.mark.slow
def test_a_folder_gives_the_evaluations_numbers_in_sorted_order(weights, images):
    files = sorted(images.rglob("*.png"))
    answers = predict(weights, images, top=np.int64(3))
    assert len(answers) == len(files) == 37
    for answer, probabilities in zip(answers, expected(weights, files), strict=True):
        assert [name for name, _ in answer] == [CLASSES[index] for index in np.argsort(-probabilities)[:3]]
        # A batch of 32 in the place of one image, and a softmax in float32: some roundings of 6e-8 of numbers below 1.
        np.testing.assert_allclose([share for _, share in answer], np.sort(probabilities)[::-1][:3], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_images_of_every_kind_are_the_same(weights, images):
    files = sorted(images.rglob("*.png"))[:2]
    whole = predict(weights, files)
    opened = [Image.open(file) for file in files]
    for kind in ([str(file) for file in files], opened, [np.asarray(image) for image in opened]):
        assert predict(weights, kind) == whole
    assert predict(weights, files[0]) == predict(weights, opened[0]) == whole[:1]
    assert predict(weights, [files[0].parent, files[1]])[-1] == whole[1]  # a folder among files
    assert [len(answer) for answer in predict(weights, files, top=100)] == [7, 7]


def test_floats_and_eight_bits_may_be_in_one_batch(weights, images):
    """An array of floats makes its neighbours floats as well; each keeps its answer."""
    pixels = [np.asarray(Image.open(file).resize((8, 8))) for file in sorted(images.rglob("*.png"))[:4]]
    floats = [image.astype(np.float32) / 255 for image in pixels]
    expected = predict(weights, pixels, top=7)
    for mixed in (floats, [pixels[0], floats[1], pixels[2], floats[3]]):
        for answer, other in zip(predict(weights, mixed, top=7), expected, strict=True):
            # The host normalises in place of the device: some roundings of 6e-8 of numbers below 1.
            assert dict(answer) == pytest.approx(dict(other), abs=1e-6)


def answers_of(weights, images):
    read_weights = read(weights)
    predictions = predictions_of(read_weights, read_weights.classes, top=7)
    return stream_predictions(read_weights, images, predictions)


def test_corrupt_files_are_named_and_the_others_go_on(weights, images, tmp_path, refuses):
    files = sorted(images.rglob("*.png"))[:3]
    (tmp_path / "broken.png").write_bytes(b"no image")
    mixed = [files[0], tmp_path / "broken.png", files[1], tmp_path / "missing.png", files[2]]
    found = list(answers_of(weights, mixed))
    assert [image for image, _ in found] == mixed
    good = [answer for _, answer in found if not isinstance(answer, castling_jax.InputError)]
    assert good == [answer for _, answer in answers_of(weights, files)]
    assert str(found[1][1]).startswith(f"'{tmp_path}/broken.png': ")
    assert "No such file" in str(found[3][1])
    with refuses("broken.png'"):
        predict(weights, mixed)


def test_images_in_memory_may_be_reused_by_their_owner(weights, images):
    files = sorted(images.rglob("*.png"))
    pixels = [np.asarray(Image.open(file).resize((12, 12))) for file in files]
    expected_answers = predict(weights, pixels)

    def reused():
        buffer = np.empty_like(pixels[0])
        for image in pixels:
            buffer[...] = image
            yield buffer

    assert predict(weights, reused()) == expected_answers
    opened = Image.open(files[0])  # not decoded yet
    assert predict(weights, [opened] * 20) == predict(weights, [files[0]] * 20)


def test_a_folder_that_is_named_like_an_image_is_a_folder(weights, images, tmp_path):
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder.png" / "x.png")
    assert len(predict(weights, tmp_path)) == 1


def test_features_are_the_last_maps_mean(weights, images):
    files = sorted(images.rglob("*.png"))[:2]
    read_weights = read(weights)
    pixels = castling_jax.preprocess(files, read_weights.preprocessing)
    maps = castling_jax.features(read_weights.model, read_weights.variables, pixels)[-1]
    found = [vector for _, vector in stream(read_weights, files, mean_features)]
    # Means of 16 float32 numbers of about 1, in another order.
    np.testing.assert_allclose(found, np.asarray(maps, np.float64).mean((1, 2)), rtol=0, atol=1e-6)


def test_what_is_refused(weights, tmp_path, refuses):
    (tmp_path / "empty").mkdir()
    with refuses("empty' holds no images"):
        predict(weights, tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").touch()
    with refuses("holds no images, only 1 other files"):
        predict(weights, tmp_path / "empty")
    with refuses("there must be at least one image"):
        predict(weights, [])
    with refuses("top must be an integer of at least 1, not 'many'"):
        predict(weights, [np.zeros((8, 8, 3), np.uint8)], top="many")
    for classes in ("abcdefg", 7):
        with refuses("classes must be a list of names"):
            predict(weights, [np.zeros((8, 8, 3), np.uint8)], classes=classes)
    with refuses("image 0"):
        predict(weights, [np.zeros((8, 8, 3), "V3")])
    with refuses("top must be an integer of at least 1, not 0"):
        predict(weights, [np.zeros((8, 8, 3), np.uint8)], top=0)
    with refuses("classes must be the names of the model's 7 outputs, not 2 names"):
        predict(weights, [np.zeros((8, 8, 3), np.uint8)], classes=["a", "b"])
    with refuses("image 0", "[8, 8, 4]"):
        predict(weights, [np.zeros((8, 8, 4), np.float32)])
    model = small.small_model()
    save_inference(tmp_path / "nameless", model, small.random_variables(model), preprocessing=PREPROCESSING)
    with refuses("does not say the names of its classes"):
        predict(tmp_path / "nameless", [np.zeros((8, 8, 3), np.uint8)])
    save_inference(tmp_path / "raw", model, small.random_variables(model), classes=CLASSES)
    with refuses("does not say how an image becomes its model's input"):
        predict(tmp_path / "raw", [np.zeros((8, 8, 3), np.uint8)])
