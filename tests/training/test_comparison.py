import json

import pytest
from etils import epath

from castling_jax.training import comparison
from tests.training.test_loop import small_config

SUMMARY = {
    **{"accuracy_inference_form": 0.9812, "eval_loss": 0.1, "parameters_inference_form": 1234, "steps": 22},
    **{"macs_inference_form": 3_670_000, "macs_train_form": 3_820_000, "train_seconds": 12.3},
}


def test_table_has_a_row_of_each():
    head, _, row, _ = comparison.table({"castling": SUMMARY}).split("\n")
    assert head.count("|") == row.count("|")
    assert row == "| castling | 98.12 % | 0.1000 | 1,234 | 3.67 M | 3.82 M | 22 | 12 s |"


@pytest.mark.slow
def test_attentions_are_trained_side_by_side_and_not_twice(tmp_path, monkeypatch):
    found = comparison.compare(small_config(), ["castling", "softmax"], epath.Path(tmp_path))
    assert found.keys() == {"castling", "softmax"}
    for attention in found:
        config = small_config(model={"attention": attention})
        config.dataset.update({"train_split": "train", "eval_split": "test"})  # were found
        expected = config.to_dict()
        assert (tmp_path / attention / "config.json").read_text() == json.dumps({"format": 1} | expected, indent=2)
    assert found["castling"]["macs_inference_form"] < found["castling"]["macs_train_form"]
    monkeypatch.setattr("castling_jax.training.run.set_up", None)  # would be called
    assert comparison.compare(small_config(), ["castling", "softmax"], epath.Path(tmp_path)) == found
