"""What weights say of their numbers: how an image becomes the input, and what the outputs are called."""

import json
import re
from pathlib import Path

import jax.export
import numpy as np
import pytest

import castling_jax
from castling_jax import Preprocessing
from castling_jax.convert import read, read_description
from castling_jax.convert.inference_folder import MODEL_FILE, PAYLOADS, PROGRAM_FILE, save_inference
from castling_jax.data.loader import evaluation_batches
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.models.registry import abstract_model
from castling_jax.normalization import normalize_images
from castling_jax.tools import convert as convert_tool
from tests.convert.runs import SIZES, write_run
from tests.data.test_decode import encoded, smooth
from tests.models import small

PREPROCESSING = Preprocessing(16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_ratio=0.9, exif=True)
CLASSES = ["0", "1", "10", "2", "ünknown", "a\nb", "'"]  # as sorted folders


LEVIT = abstract_model("levit_128s", distilled=True, num_classes=2, **SIZES)


@pytest.fixture(scope="module")
def model():
    return small.small_model(image_size=16, num_classes=len(CLASSES), attention="softmax", depth=1)


@pytest.mark.parametrize("format", PAYLOADS)
def test_an_export_says_what_evaluation_does_and_gives_its_logits(tmp_path, model, format):
    for split, number in (("train", 0), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(encoded(smooth(200, 300, seed=number)))
    variables = small.random_variables(model)
    save_inference(tmp_path / "out", model, variables, format=format, preprocessing=PREPROCESSING, classes=CLASSES)
    stated = json.loads((tmp_path / "out" / MODEL_FILE).read_text())
    assert stated["format"] == 2
    assert stated["classes"] == CLASSES
    assert stated["preprocessing"] == {
        "image_size": 16,
        "channels": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_ratio": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "exif": True,
    }
    description = read_description(tmp_path / "out")
    assert (description.preprocessing, description.classes) == (PREPROCESSING, CLASSES)

    dataset = load_dataset(f"folder:{tmp_path}", "val")
    (batch,) = evaluation_batches(dataset, batch_size=2, transform=EvalTransform(PREPROCESSING))
    images = castling_jax.preprocess([tmp_path / "val" / name for name in dataset.files], description.preprocessing)
    inference = castling_jax.create_model(**model.spec.arguments(form="inference"))
    normalized = normalize_images(batch["image"], PREPROCESSING)
    expected = castling_jax.apply(inference, castling_jax.to_inference(variables), normalized)
    if format == "stablehlo":
        program = jax.export.deserialize(bytearray((tmp_path / "out" / PROGRAM_FILE).read_bytes()))
        np.testing.assert_array_equal(images, normalized)
        # The same images into a program whose sums XLA may order otherwise: float32's rounding of order one.
        np.testing.assert_allclose(program.call(images), expected, rtol=0, atol=1e-5)
    else:
        weights = read(tmp_path / "out")
        assert (weights.preprocessing, weights.classes) == (PREPROCESSING, CLASSES)
        logits = castling_jax.apply(weights.model, weights.variables, images)
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format", [form if form == "stablehlo" else pytest.param(form, marks=pytest.mark.slow) for form in PAYLOADS]
)
def test_the_converter_hands_on_what_a_run_says(tmp_path, monkeypatch, format):
    run = write_run(tmp_path / "run", LEVIT)
    config = json.loads((run / "config.json").read_text())
    config["dataset"] |= {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_ratio": 1.0, "exif": True}
    config["dataset"]["interpolation"] = "bilinear"
    (run / "config.json").write_text(json.dumps(config))
    source = read(run)
    assert source.classes == ["a", "b"]
    values = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3), "crop_ratio": 1.0, "interpolation": "bilinear", "exif": True}
    assert source.preprocessing == Preprocessing(32, **values)
    for path, out in ((run, "out"), (tmp_path / "out", "again")) if format != "stablehlo" else ((run, "out"),):
        monkeypatch.setattr("sys.argv", ["convert", str(path), str(tmp_path / out), f"--format={format}"])
        convert_tool.main()
        description = read_description(tmp_path / out)
        assert (description.preprocessing, description.classes) == (source.preprocessing, source.classes)


def test_a_program_of_pixels_says_so_and_normalises_them(tmp_path, model):
    variables = small.random_variables(model)
    stated = {"format": "stablehlo", "preprocessing": PREPROCESSING}
    save_inference(tmp_path / "pixels", model, variables, **stated, uint8=True)
    save_inference(tmp_path / "floats", model, variables, **stated)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    programs = {}
    for name, dtype in (("pixels", "uint8"), ("floats", "float32")):
        description = tmp_path / name / MODEL_FILE
        assert json.loads(description.read_text())["image_dtype"] == dtype
        assert read_description(tmp_path / name).image_dtype == dtype
        programs[name] = jax.export.deserialize(bytearray((tmp_path / name / PROGRAM_FILE).read_bytes()))
        assert programs[name].in_avals[0].dtype == dtype
    # Two programs, one of which normalises with reciprocals: float32's rounding of numbers of order one.
    expected = castling_jax.apply(
        castling_jax.create_model(**model.spec.arguments(form="inference")),
        castling_jax.to_inference(variables),
        castling_jax.preprocess(pixels, PREPROCESSING),
    )
    np.testing.assert_allclose(programs["pixels"].call(pixels), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(programs["floats"].call(normalize_images(pixels, PREPROCESSING)), expected, atol=1e-5)
    # A folder of an earlier version, which had no other programs.
    old = json.loads((tmp_path / "floats" / MODEL_FILE).read_text())
    del old["image_dtype"]
    (tmp_path / "floats" / MODEL_FILE).write_text(json.dumps(old))
    assert read_description(tmp_path / "floats").image_dtype == "float32"


def test_the_documented_client_needs_no_more_than_the_programs_folder(tmp_path, model, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "howto" / "export.md"
    client = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[-1]
    variables = small.random_variables(model)
    save_inference(tmp_path / "pixels", model, variables, format="stablehlo", preprocessing=PREPROCESSING, uint8=True)
    (tmp_path / "cat.jpg").write_bytes(encoded(smooth(200, 300)))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(client, scope)
    assert "castling_jax" not in client
    seen = normalize_images(np.asarray(scope["seen"]), PREPROCESSING)
    # A resize and a crop, one after the other: a level of 255 or so of rounding, over the smallest std.
    np.testing.assert_allclose(seen, castling_jax.preprocess("cat.jpg", PREPROCESSING)[0], atol=2 / 255 / 0.224)
    inference = castling_jax.create_model(**model.spec.arguments(form="inference"))
    expected = castling_jax.apply(inference, castling_jax.to_inference(variables), seen[None])
    np.testing.assert_allclose(scope["logits"], expected, rtol=0, atol=1e-5)


def test_only_programs_with_a_preprocessing_take_pixels(tmp_path, model, refuses):
    variables = small.random_variables(model)
    for format in ("safetensors", "orbax"):
        with refuses(f"only a program takes uint8 images: the format must be stablehlo, not {format}."):
            save_inference(tmp_path / "out", model, variables, format=format, preprocessing=PREPROCESSING, uint8=True)
    with refuses("a program for uint8 images needs the preprocessing that it normalises by."):
        save_inference(tmp_path / "out", model, variables, format="stablehlo", uint8=True)
    assert not (tmp_path / "out").exists()


def test_folders_that_say_nothing_are_read(tmp_path, model):
    variables = small.random_variables(model)
    save_inference(tmp_path, model, variables)
    path = tmp_path / MODEL_FILE
    stated = json.loads(path.read_text())
    assert stated["preprocessing"] is stated["classes"] is None
    for keys in ((), ("preprocessing", "classes")):  # ours, and format 1's
        path.write_text(json.dumps({key: value for key, value in stated.items() if key not in keys} | {"format": 1}))
        weights = read(tmp_path)
        assert weights.preprocessing is weights.classes is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preprocessing": 3}, "preprocessing must be an object with an image_size"),
        ({"preprocessing": {"image_size": 16, "std": [0, 0, 0]}}, "std must be three finite numbers above 0"),
        (
            {"preprocessing": {"image_size": 32}},
            "of 32 pixels and 3 channels, but the model takes the size 16 and 3 channels",
        ),
        ({"classes": ["a"]}, "there are 1 names of classes, but the model has 7 classes."),
        ({"classes": "abcdefg"}, "classes must be a list of texts."),
        ({"classes": [1, 2, 3, 4, 5, 6, 7]}, "classes must be a list of texts."),
        ({"image_dtype": "int8"}, "image_dtype must be float32 or uint8, not 'int8'."),
        ({"format": 3}, "has format 3; this version reads formats up to 2."),
        ({"format": "2"}, "has format 2; this version reads formats up to 2."),
        ({"format": 0}, "has format 0; this version reads formats up to 2."),
    ],
)
def test_what_does_not_fit_the_model_is_one_sentence(refuses, tmp_path, model, changes, sentence):
    save_inference(tmp_path, model, small.random_variables(model))
    path = tmp_path / MODEL_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for reader in (read, castling_jax.load_inference, read_description):
        with refuses(str(tmp_path), sentence):
            reader(tmp_path)


def test_nothing_is_written_of_what_does_not_fit(refuses, tmp_path, model):
    variables = small.random_variables(model)
    with refuses("makes images of 8 pixels"):
        save_inference(tmp_path / "out", model, variables, preprocessing=Preprocessing(8))
    with refuses("there are 2 names of classes, but the model has 7 classes."):
        save_inference(tmp_path / "out", model, variables, classes=("a", "b"))
    grey = small.small_model(image_size=16, in_chans=1, attention="softmax", depth=1)
    with refuses("3 channels, but the model takes the size 16 and 1"):
        save_inference(tmp_path / "out", grey, small.random_variables(grey), preprocessing=PREPROCESSING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"mean": [1]}, {"std": [1, 1, "a"]}, {"crop_ratio": 0}, {"exif": None}])
def test_a_runs_config_that_says_nonsense(refuses, tmp_path, changes):
    run = write_run(tmp_path / "run", LEVIT)
    config = json.loads((run / "config.json").read_text())
    config["dataset"] |= changes
    (run / "config.json").write_text(json.dumps(config))
    with refuses("config.json' is damaged: ", next(iter(changes))):
        read(run)
