import shutil
import sys

import pytest

from castling_jax.convert.run_folder import model_arguments
from castling_jax.convert.weights import read
from castling_jax.models.registry import abstract_model
from castling_jax.training.config import check_config
from experiments import train_one
from experiments.study import (
    ROOT,
    START,
    STUDIES,
    Arm,
    Study,
    Trial,
    code_hash,
    load_study,
    study_hash,
    study_names,
    trials_of,
)
from tests.experiments.tiny import STUDY
from tests.test_imports import imports


def test_runs_are_arms_times_rates_times_seeds_and_first_seeds_come_first():
    arms = (Arm("a", {}, (3, 4), (0.1, 0.002)), Arm("b", {}, (3,), (1e-5,)))
    names = [trial.name for trial in trials_of("study", Study(STUDY.config, arms, "a", "test", ""))]
    assert names == ["a-lr0.1-seed3", "a-lr0.002-seed3", "b-lr1e-05-seed3", "a-lr0.1-seed4", "a-lr0.002-seed4"]


def test_a_run_changes_what_its_arm_says_and_nothing_else():
    arm = Arm("wide", {"model.embed_dim": 96, "seed": 7}, (2,), (0.5,))
    changed, common = Trial("tiny", arm, 0.5, 2).config(STUDY).to_dict(), STUDY.config().to_dict()
    assert (changed["model"].pop("embed_dim"), common["model"].pop("embed_dim")) == (96, None)
    assert (changed.pop("seed"), common.pop("seed")) == (2, 0)  # the run's seed wins
    assert changed["optimizer"].pop("learning_rate") == 0.5 != common["optimizer"].pop("learning_rate")
    assert changed.pop("logging") != common.pop("logging")
    assert (changed["dataset"].pop("test_split"), common["dataset"].pop("test_split")) == ("test", None)
    assert changed == common


def test_what_is_wrong_with_a_study_is_said(refuses):
    arm = Arm("a", {"model.atention": "softmax"}, (0,), (0.1,))
    with refuses("'b'", "known: a"):
        Study(STUDY.config, (arm,), "b", "test", "")
    with refuses("one name: a, a"):
        Study(STUDY.config, (arm, arm), "a", "test", "")
    with refuses("'model.atention'", "did you mean 'model.attention'?"):
        Trial("tiny", arm, 0.1, 0).config(STUDY)
    with refuses("unknown study 'nope'"):
        load_study("nope")
    starts = {"softmax": STUDY.config}
    with refuses("unknown start 'softmx'"):
        Study(STUDY.config, (Arm("a", {"init_from": START}, (0,), (0.1,), "softmx"),), "a", "test", "", starts)
    for changes, start in (({"init_from": START}, None), ({}, "softmax")):
        with refuses("the arm 'a' must name its start, and use START in a field, or neither"):
            Study(STUDY.config, (Arm("a", changes, (0,), (0.1,), start),), "a", "test", "", starts)
    later = Arm("b", {"init_from": START}, (0, 1), (0.1,), "a")
    for arm in (
        Arm("a", {}, (0,), (0.1,)),
        Arm("a", {}, (0, 1), (0.1, 0.2)),
        Arm("a", {"init_from": START}, (0, 1), (0.1,), "softmax"),
    ):
        with refuses(
            "the arm 'b' cannot start from 'a': that arm must have one learning rate, no start, and all seeds"
        ):
            Study(STUDY.config, (arm, later), "a", "test", "", starts)


@pytest.mark.slow
@pytest.mark.parametrize("is_arm", [False, True])
def test_an_arm_starts_from_a_run_that_is_trained_once(tmp_path, monkeypatch, is_arm):
    """Softmax for an epoch; then castling, from there and distilled from it."""

    def softmax():
        config = STUDY.config()
        config.model.attention = "softmax"
        return config

    changes = {"init_from": START, "distillation.teacher": START, "distillation.kind": "soft"}
    castled = Arm("castled", changes, (3,), (2e-3,), start="softmax")
    first = Arm("softmax", {"model.attention": "softmax"}, (3,), (2e-3,))
    arms, starts = ((first, castled), {}) if is_arm else ((castled,), {"softmax": softmax})
    study = Study(STUDY.config, arms, "castled", "test", "", starts)
    monkeypatch.setattr(train_one, "load_study", lambda name: study)
    monkeypatch.setattr(train_one, "code_hash", lambda name: "")
    trial = trials_of("tiny", study)[-1]
    result = train_one.train_one(trial, tmp_path / trial.name, "a")
    folder = tmp_path / ("softmax-lr0.002-seed3" if is_arm else "starts/softmax-seed3")
    begun, ended = read(folder), read(tmp_path / trial.name)
    assert (begun.model.spec.attention, ended.model.spec.attention) == ("softmax", "castling")
    assert begun.config["seed"] == ended.config["seed"] == 3
    assert ended.config["init_from"] == ended.config["distillation"]["teacher"] == str(folder)
    # Another run of the study, and the arm's own run, find the start finished.
    monkeypatch.setattr("castling_jax.training.loop.Loop.run", None)
    again = train_one._train_start(trial, study, tmp_path)
    assert (result["start"], result["start_seconds"]) == ("softmax", again.figures["train_seconds"])
    if is_arm:
        own = trials_of("tiny", study)[0]
        assert train_one.train_one(own, tmp_path / own.name, "a")["seconds"] == result["start_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_a_studys_models_can_be_made_and_its_test_split_is_no_other(name):
    study = load_study(name)
    for trial in trials_of(name, study):
        # A run that another one starts from must not have seen the test split either.
        for config in (trial.config(study), *([trial.start_of(study)[1]] if trial.arm.start else [])):
            check_config(config)
            abstract_model(**model_arguments(config))
            assert study.test_split is None or study.test_split not in (
                config.dataset.train_split,
                config.dataset.eval_split,
            )


@pytest.mark.parametrize("name", study_names())
def test_a_study_depends_on_nothing_that_the_hash_leaves_out(name):
    for imported in imports(ROOT / STUDIES / f"{name}.py"):
        head = imported.split(".")[0]
        outside = {"castling_jax", "jax", "ml_collections", "numpy", *sys.stdlib_module_names}
        assert imported.startswith("experiments.study.") or head in outside, imported


def test_the_hash_is_of_the_package_and_the_study_alone(tmp_path):
    for folder in ("castling_jax", STUDIES):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    name = "cifar10_pilot"
    before = code_hash(name, tmp_path)
    assert before == code_hash(name)  # wherever it lies, compiled or not
    (tmp_path / "experiments" / "results").mkdir()
    (tmp_path / "experiments" / "results" / "a.json").write_text("{}")
    (tmp_path / STUDIES / "another.py").write_text("STUDY = None")
    (tmp_path / "castling_jax" / "__pycache__").mkdir()
    (tmp_path / "castling_jax" / "__pycache__" / "a.pyc").write_text("compiled")
    assert code_hash(name, tmp_path) == before

    study = tmp_path / STUDIES / f"{name}.py"
    of_study = study_hash(name, tmp_path)
    for path in (tmp_path / "castling_jax" / "ops" / "norms.py", study):
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert code_hash(name, tmp_path) != before
        assert (study_hash(name, tmp_path) != of_study) == (path == study)
        path.write_bytes(content)
    (tmp_path / "castling_jax" / "py.typed").rename(tmp_path / "castling_jax" / "py.untyped")
    assert code_hash(name, tmp_path) != before
