"""The card of an exported model says what its run says, and a person's own card stays."""

import dataclasses
import json

import pytest

from castling_jax.convert.inference_folder import PAYLOADS, save_inference
from castling_jax.convert.weights import read
from castling_jax.preprocessing import Preprocessing
from castling_jax.tools import convert
from castling_jax.training.card import model_card
from tests.models import small

FIGURES = {
    "accuracy_train_form": 0.91,
    "accuracy_inference_form": 0.905,
    "eval_images": 360,
    "dataset": "digits\n# not a title",
    "split": "test",
    "steps": 7,
    "mask_threshold": 1.0,
    "max_difference": 2e-7,
    "parameters_sha256": "abc",
}


@pytest.fixture
def run(tmp_path):
    """A run's folder with its inference folder and its summary."""
    model = small.small_model()
    classes, preprocessing = [f"class {number}" for number in range(7)], Preprocessing(8)
    folder = tmp_path / "run" / "inference"
    save_inference(folder, model, small.random_variables(model), classes=classes, preprocessing=preprocessing)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(FIGURES))
    return tmp_path / "run"


def test_a_card_has_the_runs_figures_and_marks_what_a_person_must_write(run):
    weights = read(run / "inference")
    card = model_card(weights, weights.model, "safetensors")
    assert "| accuracy, training form / inference form | 91.00 % / 90.50 % of 360 images of the split test |" in card
    assert "| data | digits\\n# not a title |" in card
    assert "| SHA-256 of the trained parameters | abc |" in card
    assert "| classes | class 0, class 1," in card
    assert card.count("TODO") == 2


@pytest.mark.parametrize(
    ("averaged", "accuracy", "difference"),
    [(None, "91.00 % / 90.50 %", "2.0e-07"), (True, "91.00 % / 90.50 %", "2.0e-07"), (False, "80.00 %", "3.0e-06")],
)
def test_a_card_has_the_figures_of_its_own_weights(run, averaged, accuracy, difference):
    """convert's --ema and --no-ema choose the ones that the run does not export."""
    kinds = {"averaged": FIGURES, "raw": {"accuracy_train_form": 0.8, "accuracy_inference_form": 0.8}}
    kinds["raw"] |= {"max_difference": 3e-6}
    both = {f"{kind}_{name}": figure for kind, figures in kinds.items() for name, figure in figures.items()}
    (run / "summary.json").write_text(json.dumps(FIGURES | both | {"exported": "averaged"}))
    weights = dataclasses.replace(read(run / "inference"), averaged=averaged)
    card = model_card(weights, weights.model, "safetensors")
    assert f"| accuracy, training form / inference form | {accuracy}" in card
    assert f"| largest difference between the two forms' outputs | {difference} |" in card


def test_a_card_of_a_run_without_averages(run):
    weights = dataclasses.replace(read(run / "inference"), averaged=False)
    assert "91.00 % / 90.50 %" in model_card(weights, weights.model, "safetensors")


def test_a_card_says_how_its_format_is_used(run):
    weights = read(run / "inference")
    for format in PAYLOADS:
        card = model_card(weights, weights.model, format)
        assert (
            ("load_inference" in card) == (format != "stablehlo") != (f'open("{PAYLOADS["stablehlo"]}", "rb")' in card)
        )


def test_a_card_says_what_a_program_takes(run):
    weights = read(run / "inference")
    for uint8, takes in ((True, "uint8 RGB pixels, which it normalises itself"), (False, "float32, normalised")):
        card = model_card(weights, weights.model, "stablehlo", uint8=uint8)
        assert f"| images of the program | [batch, 8, 8, 3], {takes} |" in card
    assert "images of the program" not in model_card(weights, weights.model, "safetensors")


def test_without_a_summary_there_are_no_figures(run):
    (run / "summary.json").unlink()
    weights = read(run / "inference")
    assert "accuracy" not in model_card(weights, weights.model, "safetensors")


def test_a_persons_own_card_stays(run, tmp_path):
    convert.main([str(run / "inference"), str(tmp_path / "out")])
    assert "90.50 %" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text("mine")
    convert.main([str(run / "inference"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
