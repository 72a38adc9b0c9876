import dataclasses
import itertools
import json
import resource
import shutil
import time

import chex
import jax
import numpy as np
import pytest

from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import load_inference
from castling_jax.convert.run_folder import read_metrics
from castling_jax.convert.weights import read
from castling_jax.data.sources import load_dataset
from castling_jax.errors import DeterministicError, InputError
from castling_jax.models.variables import apply
from castling_jax.normalization import normalize_images
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.losses import cross_entropy
from castling_jax.training import loop, setup, summary
from castling_jax.training.checkpoints import Checkpoints
from castling_jax.training.config import default_config
from castling_jax.training.evaluate import configured_evaluator
from castling_jax.training.evaluate_run import evaluate_checkpoint
from castling_jax.training.run import keeping_threshold, run
from castling_jax.training.schedules import mask_threshold_schedule
from castling_jax.training.setup import set_up

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


def train(config, workdir):
    """The figures of a run whose forms are not timed, without the paths in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "measure_forms", lambda *_: None)
        return {name: value for name, value in run(config, workdir).figures.items() if name != "files"}


def without_times(workdir):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(small_config(), workdir)


def test_figures_and_files_of_a_run(whole_run):
    workdir, figures = whole_run
    assert figures["steps"] == 22
    assert figures["mask_threshold"] == 1
    assert figures["max_difference"] <= 1e-5
    assert figures["accuracy_train_form"] == figures["accuracy_inference_form"]
    config = small_config()
    config.dataset.update({"train_split": "train", "eval_split": "test"})  # were found
    assert (workdir / "config.json").read_text() == json.dumps({"format": 1} | config.to_dict(), indent=2)
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15, 18, 21, 22]
    assert [line["step"] for line in lines if "accuracy" in line] == [11, 22]
    # Speeds are those of the steps alone: to compile two programs takes longer than 22 steps of a tiny model.
    speeds = [line["images_per_second"] for line in lines if "loss" in line]
    measured = sum(128 * steps / speed for steps, speed in zip([3] * 7 + [1], speeds, strict=True))
    assert 0 < measured < figures["train_seconds"] / 2
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
    correct = apply(model, variables, normalize_images(held_out.images, Preprocessing(8))).argmax(-1) == held_out.labels
    assert float(correct.mean()) == pytest.approx(figures["accuracy_inference_form"])


def test_a_run_says_what_its_numbers_mean(whole_run):
    workdir, _ = whole_run
    expected = Preprocessing(8)  # the digits' own size, and the default's mean and deviation
    for path in (workdir, workdir / "inference"):
        weights = read(path)
        assert (weights.preprocessing, weights.classes) == (expected, list("0123456789"))
    data = json.loads((workdir / "data.json").read_text())
    assert Preprocessing.from_dict(data["preprocessing"]) == expected
    assert data["classes"] == list("0123456789")


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
        train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    figures = train(small_config(), tmp_path / "run")
    assert figures["parameters_sha256"] == expected["parameters_sha256"]
    assert without_times(tmp_path / "run") == without_times(expected_workdir)


@pytest.mark.slow
def test_a_run_that_fades(tmp_path):
    config = small_config(mask={"kind": "fade", "schedule": "linear"})
    workdir = tmp_path / "run"
    figures = train(config, workdir)
    assert (figures["mask_kind"], figures["mask_threshold"]) == ("fade", 1)
    assert figures["max_difference"] <= 1e-5
    lines = [line for line in read_metrics(workdir) if "mask_density" in line]
    for line in lines:
        assert line["mask_density"] == pytest.approx([1 - line["mask_threshold"]], abs=1e-6)
    assert lines[0]["mask_threshold"] < 0.3
    assert "22 steps in" in str(run(config, workdir))
    assert "mask fade 1 at the end" in str(run(config, workdir))
    checkpoint = read(workdir)
    assert checkpoint.model.spec.arguments()["mask_kind"] == "fade"
    # In training form, in the middle of the fade: the checkpoint says how the branch was emptied.
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    middle = evaluate_checkpoint(workdir / "checkpoints" / str(steps[0]), config.mesh)
    assert (middle.figures["mask_kind"], middle.figures["step"]) == ("fade", steps[0])
    assert "mask fade" in str(middle)
    assert load_inference(workdir / "inference")[0].spec.arguments()["mask_kind"] == "fade"


@pytest.mark.slow
def test_the_test_split_is_read_once_at_the_end_and_is_what_the_summary_tells_of(tmp_path, monkeypatch):
    read_splits = []

    def note(config, model, dataset, mesh):
        evaluate = configured_evaluator(config, model, dataset, mesh)

        def noted(*arguments):
            read_splits.append(len(dataset))
            return evaluate(*arguments)

        return noted

    monkeypatch.setattr(setup, "configured_evaluator", note)
    validate = setup.Setup.evaluate  # a figure that only the held-out split has, as AP_large may be
    monkeypatch.setattr(setup.Setup, "evaluate", lambda self, *args: validate(self, *args) | {"AP_large": 0.5})
    config, workdir = small_config(), tmp_path / "run"
    config.dataset.update({"train_split": "minitrain", "eval_split": "minival", "test_split": "test"})
    figures = train(config, workdir)
    assert read_splits == [288, 288, 360]
    assert (figures["dataset"], figures["split"], figures["eval_images"]) == ("digits", "test", 360)
    validation = figures["validation"]
    assert (validation["split"], validation["eval_images"]) == ("minival", 288)
    last = read_metrics(workdir)[-1]
    assert last["accuracy_inference_form"] == validation["accuracy_inference_form"]
    assert last["eval_loss"] == validation["eval_loss"]
    assert "AP_large" in validation and "AP_large" not in figures
    evaluated = evaluate_checkpoint(workdir, config.mesh)
    assert evaluated.figures == {name: (figures | {"step": 16})[name] for name in evaluated.figures}
    assert "AP_large" not in json.loads((evaluated.folder(workdir) / "figures.json").read_text())
    written = np.loadtxt(evaluated.folder(workdir) / "answers.csv", delimiter=",", skiprows=1, dtype=int)
    np.testing.assert_array_equal(written[:, 3], evaluated.answers.inference_form)
    assert evaluate_checkpoint(workdir, config.mesh, {"dataset.eval_split": "minival"}).figures["eval_images"] == 288
    data = json.loads((workdir / "data.json").read_text())
    assert {name: data[name]["images"] for name in ("training", "held-out", "test")} == {
        "training": 1149,
        "held-out": 288,
        "test": 360,
    }
    assert "on 360 images of digits test" in summary.describe(json.loads((workdir / "summary.json").read_text()))


def test_a_run_that_was_killed_at_its_end_only_evaluates_again(whole_run, tmp_path):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    (workdir / "summary.json").unlink()
    (workdir / "training.png").unlink()
    assert {**train(small_config(), workdir), "train_seconds": 0} == {**whole_run[1], "train_seconds": 0}
    assert (workdir / "training.png").exists()


def test_a_run_without_its_checkpoints_is_not_extended(whole_run, tmp_path, refuses):
    """It would train from the start and write over its log."""
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with refuses("a run is extended from its last checkpoint, and '", "/checkpoints' holds none: put it back, or"):
        run(small_config(train={"epochs": 4, "batch_size": 128}), workdir, extend=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_finished_run_goes_on_to_a_later_end(whole_run, tmp_path, refuses, monkeypatch):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    longer = small_config()
    longer.train.epochs = 4
    with refuses("config.train.epochs = 2, not 4", "add --extend to train it further", "--config.init_from="):
        run(longer, workdir)
    with refuses("--extend needs config.train.epochs above 2"):
        run(small_config(), workdir, extend=True)
    with refuses("there is no run in", "to extend"):
        run(small_config(), tmp_path / "nowhere", extend=True)
    files = {file: file.read_bytes() for file in workdir.iterdir() if file.is_file() and file.name != "lock"}
    with monkeypatch.context() as patch:  # what is refused late leaves the run as it was
        patch.setattr("castling_jax.training.run.compare_data", refuse)
        with refuses("the data has changed"):
            run(longer, workdir, extend=True)
    assert {file: file.read_bytes() for file in files} == files
    monkeypatch.setattr(summary, "measure_forms", lambda *_: None)
    with monkeypatch.context() as patch:  # killed before its first step, when the end is written
        patch.setattr(loop.Loop, "run", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(longer, workdir, extend=True)
    extended = run(longer, workdir, extend=True)  # the same command goes on
    assert (extended.figures["epochs"], extended.figures["steps"]) == (4, 44)
    assert extended.figures["train_seconds"] > whole_run[1]["train_seconds"]
    assert json.loads((workdir / "summary_of_2_epochs.json").read_text())["steps"] == 22
    assert json.loads((workdir / "config.json").read_text())["train"]["extended_from"] == [2]
    lines, earlier = without_times(workdir), without_times(whole_run[0])
    assert lines[: len(earlier)] == earlier
    assert {line["mask_threshold"] for line in lines[len(earlier) :]} == {1.0}
    # The cosine of 44 steps, from the optimiser's 22 updates on; float32.
    (line,) = (line for line in lines if line["step"] == 33 and "loss" in line)
    assert line["learning_rate"] == pytest.approx(float(set_up(longer).learning_rate(32)), rel=1e-6)
    assert run(small_config(train={"epochs": 4, "batch_size": 128}), workdir).figures["steps"] == 44


def refuse(*_, **__):
    raise InputError("the data has changed.")


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_a_finished_run_is_read(whole_run, monkeypatch):
    workdir, expected = whole_run
    monkeypatch.setattr("castling_jax.training.run.set_up", None)  # nothing is built
    finished = run(small_config(), workdir)
    assert expected.items() <= finished.figures.items()
    accuracy = f"{100 * expected['accuracy_inference_form']:.2f} % held out"
    assert repr(finished) == f"Summary(deit_micro, {accuracy}, 22 steps, '{workdir}')"
    assert "training form" in str(finished)
    assert finished.history["step"].tolist() == [line["step"] for line in read_metrics(workdir)]
    assert finished.history["mask_density"].shape == (len(finished.history["step"]), 1)
    assert finished.model.spec.form == "inference"
    assert finished.variables.keys() == {"params"}


def test_other_configurations_run_is_refused_and_left_alone(whole_run):
    workdir, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"config.seed = 0, not 1"):
        train(small_config(seed=1), workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_mask_does_not_open_again_when_the_end_moves():
    """It is empty from step 11 of 22 on. With twice the images the schedule's own threshold is lower there."""
    prepared = set_up(small_config())
    twice = dataclasses.replace(
        prepared, threshold_at=mask_threshold_schedule(prepared.config.mask, total_steps=2 * prepared.total_steps)
    )
    assert twice.threshold_at(12) < 0.9
    assert {keeping_threshold(twice, prepared.threshold_at(11)).threshold_at(step) for step in (12, 43)} == {1.0}
    resumed = keeping_threshold(prepared, prepared.threshold_at(3))
    assert [resumed.threshold_at(step) for step in range(4, 22)] == [
        prepared.threshold_at(step) for step in range(4, 22)
    ]
    assert keeping_threshold(prepared, None) is prepared  # an earlier version's checkpoint


def test_other_data_is_refused_or_accepted(whole_run, tmp_path, monkeypatch, capsys, refuses):
    def fewer(name, split, data_dir=None, **_):
        digits = load_dataset(name, split, data_dir=data_dir)
        return dataclasses.replace(digits, images=digits.images[left_out:], labels=digits.labels[left_out:])

    expected = json.loads((whole_run[0] / "data.json").read_text())
    assert expected["classes"] == list("0123456789")
    assert (expected["training"]["images"], expected["held-out"]["images"]) == (1437, 360)
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    (workdir / "summary.json").unlink()
    monkeypatch.setattr(setup, "load_dataset", fewer)
    left_out = 200  # of 360 to evaluate on
    with refuses("a checkpoint of step 22, but with the 1,237 images of the training split the run has 18 steps"):
        train(small_config(dataset={"accept_changes": True}), workdir)
    left_out = 5
    with refuses("the training split holds 1,432 images instead of 1,437", "config.dataset.accept_changes"):
        train(small_config(), workdir)
    assert json.loads((workdir / "data.json").read_text()) == expected
    train(small_config(dataset={"accept_changes": True}), workdir)
    assert "The data has changed since the run began: the training split holds 1,432" in capsys.readouterr().out
    assert json.loads((workdir / "data.json").read_text())["training"]["images"] == 1432


def test_a_disk_that_is_full_at_the_end_costs_no_training(whole_run, tmp_path, refuses):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "inference")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as on a full disk; the model takes 60,000 bytes
    try:
        with refuses(
            "inference' could not be written (File too large); run the same command again once it can be written."
        ):
            train(small_config(), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = read_metrics(workdir)
    figures = train(small_config(), workdir)
    assert figures["parameters_sha256"] == whole_run[1]["parameters_sha256"]
    assert read_metrics(workdir) == before


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
        train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_or_the_steps_are_skipped_until_they_are_too_many(tmp_path):
    config = small_config(optimizer={"learning_rate": 1e30, "warmup_epochs": 0.0})
    with pytest.raises(
        DeterministicError,
        match=r"is nan at step 2: there is no checkpoint yet, so the same command starts anew, and leaves such steps "
        r"out with --config.train.on_nonfinite=skip; or try a smaller config.optimizer.learning_rate .* --workdir",
    ):
        train(config, tmp_path / "run")
    # In the same folder, as the sentence says. The first step has changed the weights already, so that it is no help.
    config.train.update({"on_nonfinite": "skip", "max_skips": 5})
    with pytest.raises(DeterministicError, match=r"is nan at step 6, the last of 5 in a row .* try a smaller config"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def with_faults(batches):
        batch = next(batches)
        with_faults.step += 1
        if with_faults.step in (5, 6, 9):
            batch["image"] = batch["image"] * np.float32(np.nan)
        return batch

    with_faults.step = 0
    monkeypatch.setattr(loop, "next", with_faults, raising=False)
    config = small_config()
    config.train.update({"on_nonfinite": "skip", "max_skips": 3})
    figures = train(config, tmp_path)
    assert figures["skipped_steps"] == 3
    assert "Skipped step 6: the loss is nan (in a row: 2; 3 stop the run)." in capsys.readouterr().err
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "learning_rate" in line}
    assert {step: line["skipped_steps"] for step, line in lines.items()} == {3: 0, 6: 2, 9: 3} | dict.fromkeys(
        (12, 15, 18, 21, 22), 3
    )
    assert [step for step, line in lines.items() if "loss" not in line] == [6, 9]
    # The optimiser's rate is that of the updates that were made.
    assert lines[12]["learning_rate"] == pytest.approx(float(setup.set_up(config).learning_rate(11 - 3)))


@pytest.mark.slow
def test_raw_and_averaged_weights_are_both_evaluated_and_the_field_says_which_is_exported(tmp_path, capsys):
    names = ("accuracy_train_form", "accuracy_inference_form", "eval_loss", "max_difference")
    found = {}
    for export in (None, "raw"):
        config = small_config(train={"ema_decay": 0.99, "ema_warmup": False, "export": export})
        workdir = tmp_path / str(export)
        figures = found[export] = train(config, workdir)
        exported = export or "averaged"
        assert figures["exported"] == exported
        assert {name: figures[name] for name in names} == {name: figures[f"{exported}_{name}"] for name in names}
        assert figures["raw_eval_loss"] != figures["averaged_eval_loss"]
        # What is in inference/ is what those figures are of, and what a reader of the run gets.
        model, variables = load_inference(workdir / "inference")
        held_out = load_dataset("digits", "test")
        loss = cross_entropy(
            apply(model, variables, normalize_images(held_out.images, Preprocessing(8))), np.eye(10)[held_out.labels]
        ).mean()
        assert float(loss) == pytest.approx(figures[f"{exported}_eval_loss"], rel=1e-5)
        snapshot = read(workdir)
        assert snapshot.averaged == (exported == "averaged")
        chex.assert_trees_all_equal(to_inference(snapshot.variables), variables)
        # 0.99 to the power of the 22 steps.
        assert "At the end, 80% of the averaged weights will be the initial ones" in capsys.readouterr().out
        evaluated = evaluate_checkpoint(workdir, config.mesh).figures
        assert {name: evaluated[name] for name in figures if name in evaluated} == {
            name: figures[name] for name in figures if name in evaluated
        }
        assert evaluated.keys() >= {f"{kind}_{name}" for kind in ("raw", "averaged") for name in names}
    assert found[None]["raw_eval_loss"] == found["raw"]["raw_eval_loss"]


@pytest.mark.slow
def test_a_checkpoint_is_saved_by_the_clock_too_and_changes_nothing(whole_run, tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save

    def note(self, state, progress):
        saved.append(int(state.step))
        save(self, state, progress)

    monkeypatch.setattr(Checkpoints, "save", note)
    figures = train(small_config(checkpoint={"every_steps": 1000, "every_minutes": 1e-9}), tmp_path / "run")
    assert saved == list(range(1, 23))
    assert figures["parameters_sha256"] == whole_run[1]["parameters_sha256"]
    assert without_times(tmp_path / "run") == without_times(whole_run[0])
    saved.clear()
    train(small_config(checkpoint={"every_steps": 1000, "every_minutes": 1e6}), tmp_path / "other")
    # The last one, and those that were the best when they were evaluated.
    assert set(saved) <= {11, 22}


def test_several_processes_save_by_the_first_ones_clock(monkeypatch):
    """Other processes' part is played here."""
    asked = []

    def broadcast(mine):
        asked.append(int(mine))
        return np.int32(1)  # as process 0's clock says

    monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    now = time.perf_counter()
    assert not loop._is_time(10.0, now, logs=False)
    assert asked == []
    assert loop._is_time(10.0, now, logs=True)
    assert asked == [0]


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
        train(config, tmp_path / "run")
    monkeypatch.undo()
    shutil.rmtree(start)
    assert train(config, tmp_path / "run")["parameters_sha256"] == figures["parameters_sha256"]
    with pytest.raises(InputError, match="start'"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_levit_trains_castles_and_is_restored(tmp_path, monkeypatch):
    def large_digits(name, split, data_dir=None, **_):
        digits = load_dataset(name, split, data_dir=data_dir)
        images = digits.images[::4].repeat(4, axis=1).repeat(4, axis=2)
        return dataclasses.replace(digits, images=images, labels=digits.labels[::4])

    monkeypatch.setattr(setup, "load_dataset", large_digits)
    config = small_config(train={"epochs": 4, "batch_size": 32})
    config.optimizer.learning_rate = 3e-3
    sizes = {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8}
    config.model.update({"name": "levit_128s", "image_size": 32, "distilled": True, "drop_path_rate": 0.1} | sizes)
    figures = train(config, tmp_path / "run")
    # Chance is 10 %.
    assert figures["accuracy_inference_form"] > 0.3
    assert figures["max_difference"] <= 1e-5
    model, variables = load_inference(tmp_path / "run" / "inference")
    assert variables.keys() == {"params"}
    held_out = large_digits("digits", "test")
    correct = apply(model, variables, normalize_images(held_out.images, Preprocessing(8))).argmax(-1) == held_out.labels
    assert float(correct.mean()) == pytest.approx(figures["accuracy_inference_form"])
    # Once more, from the checkpoint, which holds the statistics.
    (tmp_path / "run" / "summary.json").unlink()
    again = train(config, tmp_path / "run")
    assert {**again, "train_seconds": 0} == {**figures, "train_seconds": 0}


# Places


def test_every_place_that_a_run_writes_to_is_tried_before_anything_is_computed(tmp_path, monkeypatch, refuses):
    def unreached(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr("castling_jax.training.run.first_variables", unreached)
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with refuses(f"'{workdir}'"):
            run(small_config(), workdir)
    for name in ("checkpoints", "inference", "tensorboard"):
        workdir = tmp_path / name
        workdir.mkdir()
        (workdir / name).write_text("")
        with refuses(f"'{workdir / name}' is a file"):
            run(small_config(), workdir)
        assert [path.name for path in workdir.iterdir()] == [name]
    for name in ("parameters.txt", "data.json", "metrics.jsonl", "training.png"):
        workdir = tmp_path / name
        (workdir / name).mkdir(parents=True)
        with refuses(f"'{workdir / name}' is a folder, but a file has to be written there"):
            run(small_config(), workdir)
        assert [path.name for path in workdir.iterdir()] == [name]
    (tmp_path / "traced").mkdir()
    (tmp_path / "traced" / "profile").write_text("")
    with refuses(f"'{tmp_path / 'traced' / 'profile'}' is a file"):
        run(small_config(), tmp_path / "traced", profile=range(1, 2))


@pytest.mark.parametrize("name", ["0099", "²", "99999999999999999999"])
def test_a_number_that_is_no_checkpoint_stops_a_start_with_a_sentence(tmp_path, refuses, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with refuses(f"'{tmp_path / 'checkpoints' / name}' is not named as a checkpoint is"):
        run(small_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("workdir", [None, 3, ""])
def test_what_is_no_folder(refuses, workdir):
    with refuses("workdir must"):
        run(small_config(), workdir)


def test_the_systems_errors_are_sentences(tmp_path, monkeypatch, refuses):
    def lost(*_):
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr("castling_jax.training.run.first_variables", lost)
    with refuses("'disk' cannot be read or written (Input/output error)."):
        run(small_config(), tmp_path)


def test_sixty_four_bits_are_refused(tmp_path, refuses):
    with jax.enable_x64(True), refuses("JAX_ENABLE_X64 must be off"):
        run(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
