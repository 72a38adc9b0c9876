"""Runs of segmenters: on several devices, killed and resumed, and evaluated again; and how they learn."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from castling_jax.bench.faults import Pod
from castling_jax.training import loop
from castling_jax.training.config import default_config
from castling_jax.training.contact_sheet import draw_sheet
from castling_jax.training.evaluate_run import evaluate_checkpoint
from castling_jax.training.preemption import Preempted
from tests.data.mask_files import NAMES, SIZES, VOID, write_masks
from tests.models.meshes import run_on_devices
from tests.tasks.segmentation.meshes import CASES
from tests.training.test_loop import train, without_times


@pytest.mark.slow
def test_a_step_is_the_same_on_any_mesh_and_in_parts():
    """From 1, 2, 4 and 8 devices, with cross entropy and dice."""
    found = json.loads(run_on_devices(8, "tests.tasks.segmentation.meshes"))
    assert found.keys() == CASES.keys()
    for case, differences in found.items():
        assert len(differences) == 6
        for what, difference in differences.items():
            # Parts update the running statistics one after another. All else is sums over the batch in another order:
            # over 8,000 pixels, whose random signs leave a hundredth of the terms' sum.
            if not ("in parts" in case and what == "batch_stats"):
                assert difference < 5e-5, (case, what)


def configured(root, **model):
    """A run of a small segmenter, which is evaluated once, at its end."""
    config = default_config()
    backbone = {"backbone": "deit_micro", "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config.model.update({"name": "pyramid_segmenter", "image_size": 32, "head_channels": 16} | backbone | model)
    config.dataset.update(name=f"masks:{root}", train_split="train", eval_split="val", test_split="test")
    config.dataset.update(crop_mode="squash", crop_ratio=1.0, ignore_label=VOID)
    config.logging.update(progress=False, tensorboard=False)
    return config


def write_splits(root):
    for seed, split in enumerate(("train", "val", "test")):
        write_masks(root, split, seed=10 * seed)
    return root


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_parameters_and_learns(tmp_path, monkeypatch):
    """Thirty epochs of two steps, with windows; the run is killed after 23 steps."""
    config = configured(write_splits(tmp_path / "data"))
    config.dataset.crop_mode = "slide"
    config.augment.update(scale_range=(0.8, 1.25), flip=0.5, distort=0.2)
    config.loss.dice = 0.5
    config.train.update(epochs=30, batch_size=2)
    config.optimizer.update(learning_rate=5e-3, warmup_epochs=1.0)
    config.evaluation.update(every_epochs=30, batch_size=4)
    config.logging.every_steps = 1
    expected = train(config, tmp_path / "alone")

    def interrupted(batches):
        interrupted.count += 1
        if interrupted.count == 23:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(batches)

    interrupted.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "next", interrupted, raising=False)
        with pytest.raises(Preempted) as told:
            train(config, tmp_path / "run")
    assert told.value.step == 23
    resumed = train(config, tmp_path / "run")
    assert {**resumed, "train_seconds": 0} == {**expected, "train_seconds": 0}
    assert without_times(tmp_path / "run") == without_times(tmp_path / "alone")

    # The colours tell the classes. Three classes with a third of the pixels each have an mIoU of 0.2 by chance.
    assert resumed["mIoU_inference_form"] > 0.6
    assert resumed["mIoU_inference_form"] == pytest.approx(resumed["mIoU_train_form"], abs=1e-3)
    assert resumed["max_difference"] <= 1e-5
    lines = without_times(tmp_path / "run")
    assert {"cross_entropy_loss", "dice_loss"} <= lines[0].keys()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    (folder,) = (tmp_path / "run" / "evaluation").iterdir()
    assert {file.name for file in folder.iterdir()} == {
        *("figures.json", "classes.csv", "confusion.png", "segmentation.png")
    }
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["classes"].keys() == {*NAMES}
    assert figures["mIoU_inference_form"] == resumed["mIoU_inference_form"]

    # Evaluated again, on another split.
    again = evaluate_checkpoint(tmp_path / "run", config.mesh, {"dataset.test_split": "val"})
    assert (again.figures["split"], again.figures["eval_images"]) == ("val", 4)
    assert "  training form " in str(again)


@pytest.mark.parametrize("crop_mode", ["squash", "slide"])
def test_a_contact_sheet_shows_the_masks(tmp_path, crop_mode):
    config = configured(write_splits(tmp_path))
    config.dataset.crop_mode = crop_mode
    config.augment.update(scale_range=(0.5, 2.0), flip=0.5)
    figure = draw_sheet(config, examples=2)
    first = [axis for axis in figure.axes if axis.images][:2]
    assert [len(axis.images) for axis in first] == [1, 2]  # evaluation's image, then training's with its mask
    assert "3 classes" in {axis.get_ylabel() for axis in figure.axes}
    layer = np.asarray(first[1].images[1].get_array())
    assert layer.shape == (32, 32, 4)


@pytest.mark.slow
def test_one_and_two_processes_count_the_same_pixels(tmp_path):
    """Five images in batches of two, in windows; nothing is learnt, so both runs have the same parameters."""
    for split in ("train", "val"):
        write_masks(tmp_path / "data", split, sizes=[*SIZES, (40, 17)])
    sizes = {"backbone": "deit_micro", "embed_dim": 16, "depth": 1, "num_heads": 1, "head_channels": 8}
    changes = {f"model.{name}": value for name, value in ({"image_size": 32} | sizes).items()}
    changes |= {"dataset.name": f"masks:{tmp_path / 'data'}", "dataset.test_split": "val", "dataset.crop_mode": "slide"}
    changes |= {"train.epochs": 1, "train.batch_size": 2, "optimizer.learning_rate": 0.0, "evaluation.batch_size": 2}
    changes |= {
        "optimizer.warmup_epochs": 0.0,
        "logging.tensorboard": False,
        "logging.progress": False,
    }
    flags = ("--config=camvid", *(f"--config.{name}={value}" for name, value in changes.items()))
    tables, figures = [], []
    for processes in (1, 2):
        pod = Pod(tmp_path / f"run {processes}", processes=processes, flags=flags)
        assert pod.wait() == 0, pod.output()
        (folder,) = (pod.workdir / "evaluation").iterdir()
        tables.append((folder / "classes.csv").read_text())
        figures.append(json.loads((folder / "figures.json").read_text()))
    assert tables[0] == tables[1]
    assert figures[0]["eval_images"] == figures[1]["eval_images"] == 5
    # Sums of float32 in another order.
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_damaged_images_are_counted_and_wrong_masks_end_a_run(tmp_path, refuses):
    config = configured(write_splits(tmp_path / "data"))
    config.train.update(epochs=1, batch_size=2)
    config.evaluation.update(batch_size=4)
    Image.new("L", (3, 3)).save(tmp_path / "data" / "test_labels" / "002.png")
    config.dataset.max_corrupt_share = 0.5
    figures = train(config, tmp_path / "run")
    assert (figures["eval_images"], figures["eval_corrupt"]) == (3, 1)
    for mask in (tmp_path / "data" / "train_labels").iterdir():
        Image.new("L", (3, 3)).save(mask)
    with refuses("4 images in a row are corrupt, the first of them", "the mask has 3 x 3 pixels, but its image has"):
        train(config, tmp_path / "other")
