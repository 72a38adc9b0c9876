"""Runs of masked autoencoders: killed and resumed, and from pre-training to a classifier."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

import castling_jax
from castling_jax.convert.weights import read
from castling_jax.data.sources import digits
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten
from castling_jax.probe import probe, save_features
from castling_jax.training.config import default_config
from castling_jax.training.evaluate_run import evaluate_checkpoint
from castling_jax.training.export import convert
from castling_jax.training.setup import first_variables, set_up
from castling_jax.training.weights import initial_variables
from tests.tasks.interrupted import check_resumed
from tests.training.test_loop import train

pytestmark = pytest.mark.slow
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def configured(**model):
    """A run of a small masked autoencoder on the digits: 16 patches of 2 x 2 pixels, of which 4 are visible."""
    config = default_config()
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    config.model.update({"name": "mae", "backbone": "deit_micro", "image_size": 8, "patch_size": 2} | SIZES | decoder)
    config.model.update(model)
    config.dataset.update({"crop_ratio": 1.0})
    config.train.update({"epochs": 2, "batch_size": 256})
    config.loss.label_smoothing = 0.1
    config.evaluation.every_epochs = 2
    config.logging.update({"progress": False, "tensorboard": False, "every_steps": 1})
    return config


def test_a_run_that_is_killed_goes_on_to_the_same_parameters(tmp_path, monkeypatch):
    figures = check_resumed(configured(), tmp_path, monkeypatch, after=4)
    assert figures["task"] == "reconstruction"
    # Both forms are evaluated at threshold 1, with the same patches hidden.
    assert figures["reconstruction_loss_train_form"] == pytest.approx(
        figures["reconstruction_loss_inference_form"], abs=1e-5
    )
    assert figures["max_difference"] <= 1e-5


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    config = configured(token_conv="2d")
    config.augment.update({"crop_scale": (0.5, 1.0), "flip": 0.5})
    config.train.update({"epochs": 12, "ema_decay": 0.9})
    config.optimizer.update({"learning_rate": 4e-3, "b2": 0.95})
    train(config, folder)
    return folder


def test_it_learns(pretrained):
    """A patch of the mean's colour would have a loss of (n - 1) / n for n pixels, since the variance is unbiased."""
    figures = json.loads((pretrained / "summary.json").read_text())
    assert figures["reconstruction_loss_inference_form"] < 0.8 * 11 / 12
    evaluation = evaluate_checkpoint(pretrained, {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1})
    assert evaluation.figures["reconstruction_loss_inference_form"] == pytest.approx(
        figures["reconstruction_loss_inference_form"], rel=1e-6
    )
    assert "loss" in str(evaluation)


def test_it_is_evaluated_on_images_of_other_classes(pretrained, tmp_path):
    """No label is read: not a folder's, and not the classes in masks."""
    for root in (tmp_path / "folder" / "cats", tmp_path / "masks" / "val", tmp_path / "masks" / "val_labels"):
        root.mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 2 * number).save(root / f"{number}.png")
    (tmp_path / "masks" / "classes.txt").write_text("".join(f"class {number}\n" for number in range(5)))
    mesh = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}
    for name, split in (("folder", "train without 10%"), ("masks", "val")):
        changes = {"dataset.name": f"{name}:{tmp_path / name}", "dataset.eval_split": split}
        assert evaluate_checkpoint(pretrained, mesh, changes).figures["eval_images"] == 3 - (name == "folder")


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_it_is_exported_and_described(pretrained, tmp_path, capsys, format):
    convert(epath.Path(pretrained), epath.Path(tmp_path / "out"), format=format, ema=None, bfloat16=False, check=True)
    printed = capsys.readouterr().out
    assert "params/decoder_blocks/*/attn/proj/kernel" in printed
    assert "read back, give" in printed
    model = read(pretrained).model
    assert "decoder, without its blocks" in castling_jax.describe(model)


def test_predictions_are_images(pretrained):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    answers = castling_jax.predict(pretrained, list(images))
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_array_equal(answer["original"], image)
        visible = (answer["masked"] == image).all(-1)
        assert visible.mean() == pytest.approx(4 / 16, abs=0.05)  # a hidden pixel may be grey by itself
        np.testing.assert_array_equal(answer["reconstruction"][visible], image[visible])
        assert np.isfinite(answer["loss"])


@pytest.mark.parametrize(("attention", "pool"), [("castling", "token"), ("linear_angular", "avg")])
def test_its_backbone_starts_a_classifier(pretrained, attention, pool):
    config = default_config()
    config.model.update({"name": "deit_micro", "attention": attention, "token_conv": "2d", "global_pool": pool} | SIZES)
    config.init_from = str(pretrained)
    variables = flatten(first_variables(set_up(config))["params"])
    weights = flatten(read(pretrained).variables["params"])
    for path, leaf in variables.items():
        if path.startswith(("head/", "fc_norm/")):
            np.testing.assert_array_equal(leaf, 1.0 if path == "fc_norm/scale" else 0.0)
        else:
            np.testing.assert_array_equal(leaf, weights[f"backbone/{path}"], err_msg=path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("picodet_s", {"image_size": 160, "neck_channels": 16, "num_convs": 1}),
        ("pyramid_segmenter", {"image_size": 40, "head_channels": 16}),  # padded to 64 pixels for its backbone
    ],
)
def test_its_backbone_starts_other_models(pretrained, name, sizes):
    backbone = SIZES | {"patch_size": 2, "token_conv": "2d"}
    model = abstract_model(name, backbone="deit_micro", backbone_arguments=backbone, **sizes)
    variables = flatten(initial_variables(pretrained, model, reset_head=False)["params"])
    weights = flatten(read(pretrained).variables["params"])
    for path in weights:
        if path.startswith("backbone/blocks/"):
            np.testing.assert_array_equal(variables[path], weights[path], err_msg=path)


def test_its_features_can_be_probed(pretrained, tmp_path):
    for split, count in (("train", 120), ("test", 60)):
        data = digits(split)
        for index in range(count):
            folder = tmp_path / split / str(data.labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.round(255 * data.images[index]).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    features = [save_features(pretrained, tmp_path / split, tmp_path / f"{split}.npz") for split in ("train", "test")]
    assert features[0].features.shape == (120, 16)
    assert probe(*features)["linear_accuracy"] > 0.3  # a tenth by chance
