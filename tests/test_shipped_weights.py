"""The weights that come with the package are what their cards say."""

import re

import numpy as np
import pytest

import castling_jax
from castling_jax.convert.shipped import WEIGHTS, shipped_names
from castling_jax.data.prepare import DEBIAN_ARCHIVES, prepare
from castling_jax.data.sources import load_dataset
from castling_jax.models.macs import count_macs
from castling_jax.models.variables import count_parameters

MEGABYTE = 10**6


def card_of(name):
    return (WEIGHTS / name / "README.md").read_text()


def share_right(name, dataset):
    examples = [dataset[index] for index in range(len(dataset))]
    answers = castling_jax.predict(name, [example["image"] for example in examples], top=1)
    return np.mean(
        [answer[0][0] == dataset.classes[example["label"]] for answer, example in zip(answers, examples, strict=True)]
    )


@pytest.mark.parametrize("name", shipped_names())
def test_a_card_says_what_the_model_is(name):
    card, folder = card_of(name), WEIGHTS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < MEGABYTE
    assert "TODO" not in card
    for what in ("license of the data", "command", "classes", "accuracy, training form / inference form"):
        assert f"| {what} |" in card
    model, variables = castling_jax.load_inference(name)
    assert f"| parameters | {count_parameters(variables):,} |" in card
    assert f"| MACs an image | {count_macs(model) / 1e6:,.2f} M |" in card


@pytest.mark.parametrize(
    "name",
    ["digits", pytest.param("fashion_mnist", marks=pytest.mark.slow)],  # 10,000 images
)
def test_a_card_has_the_models_accuracy(name, tmp_path):
    if name == "fashion_mnist":
        if not DEBIAN_ARCHIVES.is_dir():
            pytest.skip("dataset-fashion-mnist is not installed")
        prepare(name, data_dir=tmp_path)
    found = share_right(name, load_dataset(name, "test", data_dir=tmp_path))
    train_form, inference_form = re.search(r"\| ([\d.]+) % / ([\d.]+) % of", card_of(name)).groups()
    assert train_form == inference_form
    assert f"{100 * found:.2f}" == inference_form
