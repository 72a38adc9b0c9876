"""What weights say of their numbers: how an image becomes the input, and what the outputs are called."""

import json

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
    expected = castling_jax.apply(inference, castling_jax.to_inference(variables), batch["image"])
    if format == "stablehlo":
        program = jax.export.deserialize(bytearray((tmp_path / "out" / PROGRAM_FILE).read_bytes()))
        np.testing.assert_array_equal(images, batch["image"])
        # The same images into a program whose sums XLA may order otherwise: float32's rounding of order one.
        np.testing.assert_allclose(program.call(images), expected, rtol=0, atol=1e-5)
    else:
        weights = read(tmp_path / "out")
        assert (weights.preprocessing, weights.classes) == (PREPROCESSING, CLASSES)
        logits = castling_jax.apply(weights.model, weights.variables, images)
        np.testing.assert_array_equal(logits, expected)


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
