"""Images of any kind become what evaluation gives the model, and nothing else is taken for an image."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import castling_jax
from castling_jax import Preprocessing, normalize_images, preprocess
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.training.config import default_config
from tests.data.test_decode import encoded, smooth

IMAGENET = Preprocessing(32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_files_become_what_evaluation_gives_the_model(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(encoded(smooth(300, 400 + 50 * number, seed=number)))
    dataset = load_dataset(f"folder:{tmp_path}", "val")
    (batch,) = evaluation_batches(dataset, batch_size=2, transform=EvalTransform(IMAGENET))
    paths = [tmp_path / "val" / name for name in dataset.files]
    whole = preprocess(paths, IMAGENET)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, normalize_images(batch["image"], IMAGENET))
    for form in (
        [str(path) for path in paths],
        (path.read_bytes() for path in paths),
        [Image.open(path) for path in paths],
        [np.asarray(Image.open(path)) for path in paths],
    ):
        np.testing.assert_array_equal(preprocess(form, IMAGENET), whole)
    for one in (paths[0], str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), np.asarray(Image.open(paths[0]))):
        np.testing.assert_array_equal(preprocess(one, IMAGENET), whole[:1])


def test_the_published_recipe_by_hand():
    """torchvision's Resize(36), CenterCrop(32), ToTensor, Normalize, as two steps of Pillow's and a formula."""
    image = smooth(72, 108)
    resized = Image.fromarray(image).resize((54, 36), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized.crop((11, 2, 43, 34)), np.float64) / 255
    expected = (cropped - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    # One resampling in place of a resize and a crop: a level of 255 or so of rounding, over the smallest std.
    np.testing.assert_allclose(preprocess(image, IMAGENET)[0], expected, atol=2 / 255 / 0.224)


def test_arrays_in_every_form():
    grey = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    colors = np.repeat(grey[..., None], 3, -1)
    expected = normalize_images(colors, IMAGENET)
    floats = colors.astype(np.float32) / np.float32(255)
    for images in (colors, list(colors), list(grey), list(grey[..., None]), floats, list(floats), jnp.asarray(colors)):
        np.testing.assert_array_equal(preprocess(images, IMAGENET), expected)
    np.testing.assert_array_equal(preprocess(grey[0], IMAGENET), expected[:1])
    np.testing.assert_array_equal(preprocess(floats[0, ..., 0].astype(np.float64), IMAGENET), expected[:1])


def test_normalisation_is_a_formula_for_numpy_and_jax():
    image = smooth(5, 4)
    expected = (image / 255 - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    # float32's rounding of numbers up to 2.6.
    for images in (image, image / np.float32(255), jnp.asarray(image), image[None, None]):
        np.testing.assert_allclose(
            np.asarray(normalize_images(images, IMAGENET)).reshape(expected.shape), expected, atol=1e-6
        )
    assert normalize_images(jnp.asarray(image, jnp.bfloat16) / 255, IMAGENET).dtype == jnp.float32
    for none in (image[None][:0], image[:, :0], jnp.asarray(image[None][:0])):
        assert normalize_images(none, IMAGENET).shape == none.shape


def test_a_list_is_no_array(refuses):
    for images in ([[[0.5, 0.5, 0.5]]], None):
        with refuses("images must be an array [..., height, width, 3], not", type(images).__name__):
            normalize_images(images, IMAGENET)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, bool, complex])
def test_other_numbers_are_no_images(refuses, dtype):
    image = np.ones((4, 4, 3), dtype)
    with refuses("images must be uint8, or floats in [0, 1]", str(np.dtype(dtype))):
        normalize_images(image, IMAGENET)
    with refuses("image 0: an image must be encoded bytes, or uint8", str(np.dtype(dtype))):
        preprocess(image, IMAGENET)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "at least one image"),
        ("nowhere.jpg", "'nowhere.jpg': the file cannot be read (No such file or directory)."),
        ([b"not an image"], "image 0: an image cannot be decoded"),
        ([smooth(8, 8), smooth(8, 8)[..., :2]], "image 1: an image must be encoded bytes, or uint8"),
        (255 * np.ones((4, 4, 3), np.float32), "image 0: floats must be in [0, 1], not from 255 to 255."),
        (-np.ones((4, 4, 3), np.float32), "in [0, 1], not from -1 to -1."),
        (np.full((4, 4, 3), np.nan), "in [0, 1], not from nan to nan."),
        (np.ones((3, 4, 4), np.float32), "not [3, 4, 4]; several grey ones are a list."),
        (np.ones((0, 4, 3), np.float32), "not [0, 4, 3]; several grey ones are a list."),
        (None, "an image or a list of them, not NoneType."),
        ([None], "image 0: an image must be a path, bytes, a Pillow image or an array, not NoneType."),
        ([[1, 2]], "image 0: an image must be a path, bytes, a Pillow image or an array, not list."),
    ],
)
def test_what_is_no_image_is_one_sentence(refuses, images, sentence):
    with refuses(sentence):
        preprocess(images, IMAGENET)


def test_weights_that_do_not_say_how_their_images_are_made(refuses):
    with refuses("a Preprocessing, not NoneType", "castling_jax.convert.read(PATH).preprocessing"):
        preprocess(smooth(8, 8), None)


def test_it_is_kept_as_json():
    whole = Preprocessing(7, mean=(0, 0.5, 1), std=(1, 2, 3), crop_ratio=1, interpolation="bilinear", exif=True)
    assert Preprocessing.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    numpys = Preprocessing(np.int64(7), mean=np.array([0, 0.5, 1]), std=(np.int8(1), 2, 3), crop_ratio=np.float32(1))
    same = Preprocessing(7, mean=(0, 0.5, 1), std=(1, 2, 3), crop_ratio=1)
    assert Preprocessing.from_dict(json.loads(json.dumps(numpys.to_dict()))) == numpys == same
    data = default_config().dataset  # an earlier version's config.json may lack them
    names = ("mean", "std", "crop_ratio", "crop_mode", "interpolation", "exif")
    assert Preprocessing(7) == Preprocessing(7, **{name: data[name] for name in names})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "with an image_size"),
        ([], "with an image_size"),
        (None, "with an image_size"),
        ({"image_size": 0}, "image_size must be a positive integer, or a height and a width, not 0."),
        ({"image_size": "8"}, "image_size must be a positive integer, or a height and a width, not '8'."),
        ({"image_size": True}, "image_size must be"),
        ({"image_size": 8, "means": 1}, "unknown attribute of the preprocessing 'means': did you mean 'mean'?"),
        ({"image_size": 8, "mean": [0, 1]}, "mean must be three finite numbers, not (0, 1)."),
        ({"image_size": 8, "mean": "abc"}, "mean must be three finite numbers"),
        ({"image_size": 8, "std": [1, float("nan"), 1]}, "std must be three finite numbers"),
        ({"image_size": 8, "std": [1, 0, 1]}, "std must be three finite numbers above 0"),
        ({"image_size": 8, "crop_ratio": 1.5}, "crop_ratio must be a number in (0, 1], not 1.5."),
        ({"image_size": 8, "crop_ratio": None}, "crop_ratio must be"),
        ({"image_size": 8, "interpolation": "lanczos"}, "unknown interpolation 'lanczos'"),
        ({"image_size": 8, "channels": "BGR"}, "unknown channels 'BGR'"),
        ({"image_size": 8, "exif": 1}, "exif must be True or False, not 1."),
    ],
)
def test_what_is_no_preprocessing_is_one_sentence(refuses, fields, sentence):
    with refuses(sentence):
        Preprocessing.from_dict(fields)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_models_refuse_images_that_were_not_normalised(refuses, dtype):
    model = castling_jax.create_model("deit_micro", num_classes=3, depth=1, attention="softmax")
    variables = castling_jax.get_variables(model)
    images = np.ones((1, 8, 8, 3), dtype)
    with refuses("images must be floating-point numbers", str(np.dtype(dtype)), "preprocess"):
        castling_jax.apply(model, variables, images)
    with refuses("floating-point numbers"):
        model(jnp.asarray(images))


def turned(image, orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, exif=exif, **options)
    return file.getvalue()


# EXIF 2.3: where row 0 and column 0 of the stored pixels are in the picture. Stored = UPRIGHT turned the other way.
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_counts_where_it_is_asked_for(orientation, kind):
    upright = smooth(48, 60)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = turned(stored, orientation, kind, **({"lossless": True} if kind == "WEBP" else {}))
    seen = {exif: preprocess(data, Preprocessing(32, exif=exif, crop_ratio=1.0)) for exif in (False, True)}
    np.testing.assert_array_equal(seen[True], preprocess(upright, Preprocessing(32, crop_ratio=1.0)))
    np.testing.assert_array_equal(seen[False], preprocess(stored, Preprocessing(32, crop_ratio=1.0)))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    data = turned(smooth(48, 60), orientation)
    expected = preprocess(data, Preprocessing(32))
    np.testing.assert_array_equal(preprocess(data, Preprocessing(32, exif=True)), expected)
