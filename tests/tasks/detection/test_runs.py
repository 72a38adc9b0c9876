"""Runs of detectors: on several devices, killed and resumed, and until they know their images by heart."""

import json

import jax
import pytest
from flax import nnx

from castling_jax.convert.weights import read
from castling_jax.models import picodet
from castling_jax.models.batch_norm import LinearNorm
from castling_jax.models.depthwise_separable import Activated
from castling_jax.training.config import default_config
from castling_jax.training.setup import set_up
from tests.data.box_files import write_coco
from tests.models.meshes import run_on_devices
from tests.tasks.detection.coco128 import write_coco128
from tests.tasks.detection.meshes import CASES
from tests.tasks.interrupted import check_resumed
from tests.training.test_loop import train

pytestmark = pytest.mark.slow


def test_a_step_is_the_same_on_any_mesh_and_in_parts():
    """With ATSS (step 0), with TAL (step 1) and with the legacy losses, from 1, 2, 4 and 8 devices."""
    found = json.loads(run_on_devices(8, "tests.tasks.detection.meshes"))
    assert found.keys() == CASES.keys()
    for case, differences in found.items():
        assert len(differences) == (7 if "legacy" in case else 14)
        for what, difference in differences.items():
            # Parts update the running statistics one after another. All else is sums over the batch in another order.
            if not ("in parts" in case and what.startswith("batch_stats")):
                assert difference < 1e-5, (case, what)


class Neck(nnx.Module):
    """A 1 x 1 convolution of each map, and a pool for the fourth one."""

    def __init__(self, channels_in, channels, neck, layers):
        self.convs = nnx.List(Activated(conv=LinearNorm(width, channels, layers)) for width in channels_in)

    def __call__(self, maps, *, training):
        outputs = [conv(x, training=training) for conv, x in zip(self.convs, maps, strict=True)]
        return [*outputs, nnx.avg_pool(outputs[-1], (2, 2), (2, 2), padding="SAME")]


class Head(nnx.Module):
    """A 1 x 1 convolution to the scores and the boxes' bins."""

    def __init__(self, sizes, layers):
        self.conv = Activated(conv=LinearNorm(sizes.channels, sizes.num_classes + 32, layers))

    def __call__(self, x, *, training):
        x = self.conv(x, training=training)
        return {"scores": jax.nn.sigmoid(x[..., :-32]), "reg_logits": x[..., -32:]}


def configured(root, **model):
    """A run of PicoDet on a small DeiT, which is evaluated once, at its end."""
    config = default_config()
    backbone = {"backbone": "deit_micro", "patch_size": 16, "init_std": 0.02}
    config.model.update({"name": "picodet_s", "image_size": 160, "num_convs": 1} | backbone | model)
    config.dataset.update({"name": f"coco:{root}", "train_split": "train", "eval_split": "val"})
    config.dataset.update({"crop_mode": "squash", "crop_ratio": 1.0})
    config.logging.update({"progress": False, "tensorboard": False})
    return config


def test_a_run_of_two_sizes_that_is_killed_goes_on_to_the_same_parameters(tmp_path, monkeypatch):
    """Six steps: the run is killed after three, and TAL starts at the fifth."""
    # A neck and heads whose gradients compile in seconds, for two sizes of images and three runs.
    monkeypatch.setattr(picodet, "Pan", Neck)
    monkeypatch.setitem(picodet.HEADS, "lc_pan", Head)
    root = write_coco(write_coco(tmp_path / "data", "train"), "val")
    config = configured(root, embed_dim=16, depth=1, num_heads=2, neck_channels=8)
    config.seed = 1
    config.augment.update({"image_sizes": (160, 192), "box_crop": True, "flip": 0.5, "distort": 0.5})
    config.train.update({"epochs": 3, "batch_size": 2})
    config.optimizer.update({"name": "sgd", "learning_rate": 0.1})
    config.loss.atss_epochs = 2.0
    config.evaluation.update({"every_epochs": 3, "batch_size": 2})
    config.logging.every_steps = 1
    batches = set_up(config).batches()
    sizes = [next(batches)["image"].shape[1] for _ in range(6)]
    assert {*sizes[:3]} == {*sizes[3:]} == {160, 192}
    check_resumed(config, tmp_path, monkeypatch, after=3)


def test_a_detector_learns_eight_photographs_by_heart(tmp_path):
    """Of COCO, with 11 objects of 9 classes, in 70 steps, the last 30 with TAL."""
    root = write_coco128(tmp_path / "data", tmp_path / "archive", count=8)
    config = configured(root, embed_dim=128, depth=2, num_heads=4, neck_channels=16)
    config.train.update({"epochs": 70, "batch_size": 8})
    config.optimizer.update({"learning_rate": 6e-3, "warmup_epochs": 4.0, "weight_decay": 0.0})
    config.loss.atss_epochs = 40.0
    config.evaluation.update({"every_epochs": 70, "batch_size": 8})
    figures = train(config, tmp_path / "run")
    assert figures["mAP_train_form"] > 0.5
    assert figures["mAP_inference_form"] == pytest.approx(figures["mAP_train_form"], abs=0.01)
    assert figures["max_difference"] <= 1e-4
    assert (figures["eval_images"], figures["eval_corrupt"]) == (8, 0)
    # COCO's numbers of the classes, which a prediction states.
    ids = set_up(config).train_set.category_ids.tolist()
    assert read(tmp_path / "run").category_ids == read(tmp_path / "run" / "inference").category_ids == ids
