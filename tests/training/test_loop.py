import dataclasses
import itertools
import json
import shutil

import pytest

from castling_jax.convert.inference_folder import load_inference
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import normalize
from castling_jax.errors import InputError
from castling_jax.models.variables import apply
from castling_jax.training import loop, setup
from castling_jax.training.config import default_config
from castling_jax.training.metrics import read_metrics

TIMES = ("images_per_second", "images_per_second_per_chip", "data_wait_share", "eta_seconds")


def small_config(**changes):
    """Two epochs of 11 steps; the mask is empty from step 11 on; a checkpoint every 4 steps."""
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 1, "embed_dim": 32, "drop_path_rate": 0.2})
    config.augment.shift_pixels = 1
    config.train.update({"epochs": 2, "batch_size": 128})
    config.optimizer.warmup_epochs = 0.5
    config.mask.update({"begin": 0.1, "end": 0.5})
    config.checkpoint.every_steps = 4
    config.logging.update({"every_steps": 3, "progress": False, "tensorboard": False})
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, loop.train(small_config(), workdir)


def test_figures_and_files_of_a_run(whole_run):
    workdir, figures = whole_run
    assert figures["steps"] == 22
    assert figures["mask_threshold"] == 1
    assert figures["max_difference"] <= 1e-5
    assert figures["accuracy_train_form"] == figures["accuracy_inference_form"]
    assert figures["train_seconds"] > 0
    assert (workdir / "config.json").read_text() == json.dumps(small_config().to_dict(), indent=2)
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15, 18, 21, 22]
    assert [line["step"] for line in lines if "accuracy" in line] == [11, 22]
    thresholds = [line["mask_threshold"] for line in lines if "mask_threshold" in line]
    assert thresholds[0] < thresholds[1] < thresholds[-1] == 1
    for line in lines:
        if "loss" in line:
            assert line.keys() >= {"learning_rate", "gradient_norm", *TIMES}
            assert line["gradient_norm"] > 0
    assert "mesh: replica 1, data 1" in (workdir / "parameters.txt").read_text()
    assert all(len(line["mask_density"]) == 1 for line in lines if "mask_density" in line)


def test_inference_folder_gives_the_reported_accuracy(whole_run):
    workdir, figures = whole_run
    model, variables = load_inference(workdir / "inference")
    held_out = load_dataset("digits", "test")
    correct = apply(model, variables, normalize(held_out.images)).argmax(-1) == held_out.labels
    assert float(correct.mean()) == pytest.approx(figures["accuracy_inference_form"])


# Before the first checkpoint, with the branch, and without it.
@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 6, pytest.param(15, marks=pytest.mark.slow)])
def test_interrupted_run_ends_with_the_same_parameters(whole_run, tmp_path, monkeypatch, stop):
    expected_workdir, expected = whole_run

    steps = itertools.count()

    def interrupted(iterator):
        if next(steps) >= stop:
            raise KeyboardInterrupt
        return next(iterator)

    monkeypatch.setattr(loop, "next", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        loop.train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    figures = loop.train(small_config(), tmp_path / "run")
    assert figures["parameters_sha256"] == expected["parameters_sha256"]

    def without_times(workdir):
        return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(workdir)]

    assert without_times(tmp_path / "run") == without_times(expected_workdir)


def test_finished_run_only_evaluates_again(whole_run):
    workdir, expected = whole_run
    figures = loop.train(small_config(), workdir)
    assert {**figures, "train_seconds": 0} == {**expected, "train_seconds": 0}


def test_other_configurations_run_is_refused_and_left_alone(whole_run):
    workdir, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"config.seed = 0, not 1"):
        loop.train(small_config(seed=1), workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "deit_micr"}}, "did you mean 'deit_micro'"),
        ({"model": {"attention": "castle"}}, "did you mean 'castling'"),
        ({"model": {"num_heads": 5}}, "5 heads do not divide the width 32"),
        ({"dataset": {"name": "fashion_mnst"}}, "unknown dataset 'fashion_mnst'"),
        ({"train": {"batch_size": 2000}}, "not 2000"),
        ({"mask": {"schedule": "steps"}}, "unknown config.mask.schedule"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        InputError,
        match=r"is nan at step 2: the checkpoints before it are kept; try a smaller config.optimizer.learning_rate",
    ):
        loop.train(small_config(optimizer={"learning_rate": 1e30, "warmup_epochs": 0.0}), tmp_path / "run")


@pytest.mark.slow
def test_a_run_starts_from_another_and_goes_on_without_it(whole_run, tmp_path, monkeypatch):
    first, figures = whole_run
    start = shutil.copytree(first, tmp_path / "start")
    config = small_config(init_from=str(start))
    # Nothing is learnt, so what the run ends with is what it started from.
    config.optimizer.update({"initial_learning_rate": 0.0, "learning_rate": 0.0, "final_learning_rate": 0.0})
    steps = itertools.count()

    def interrupted(iterator):
        if next(steps) >= 6:
            raise KeyboardInterrupt
        return next(iterator)

    monkeypatch.setattr(loop, "next", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    monkeypatch.undo()
    shutil.rmtree(start)
    assert loop.train(config, tmp_path / "run")["parameters_sha256"] == figures["parameters_sha256"]
    with pytest.raises(InputError, match="start'"):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_levit_trains_castles_and_is_restored(tmp_path, monkeypatch):
    def large_digits(name, split, data_dir=None):
        digits = load_dataset(name, split, data_dir=data_dir)
        return dataclasses.replace(digits, images=digits.images.repeat(4, axis=1).repeat(4, axis=2))

    monkeypatch.setattr(setup, "load_dataset", large_digits)
    config = small_config(train={"epochs": 4})
    config.optimizer.learning_rate = 3e-3
    sizes = {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8}
    config.model.update({"name": "levit_128s", "image_size": 32, "distilled": True, "drop_path_rate": 0.1} | sizes)
    figures = loop.train(config, tmp_path / "run")
    # Chance is 10 %.
    assert figures["accuracy_inference_form"] > 0.3
    assert figures["max_difference"] <= 1e-5
    model, variables = load_inference(tmp_path / "run" / "inference")
    assert variables.keys() == {"params"}
    held_out = large_digits("digits", "test")
    correct = apply(model, variables, normalize(held_out.images)).argmax(-1) == held_out.labels
    assert float(correct.mean()) == pytest.approx(figures["accuracy_inference_form"])
    # Once more, from the checkpoint, which holds the statistics.
    again = loop.train(config, tmp_path / "run")
    assert {**again, "train_seconds": 0} == {**figures, "train_seconds": 0}
