import json
import shutil

import chex
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from castling_jax import load_inference
from castling_jax.convert import from_torch, read, shipped, to_torch
from castling_jax.convert.checkpoint import checkpoint_steps
from castling_jax.convert.inference_folder import save_inference
from castling_jax.convert.manifest import write_manifest
from castling_jax.convert.run_folder import read_config
from castling_jax.models.variables import get_variables
from tests.convert.runs import write_averages, write_run
from tests.models import small


@pytest.fixture(scope="module")
def model():
    return small.small_levit(image_size=32, distilled=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    return write_run(tmp_path_factory.mktemp("runs") / "run", model)


def without_manifest(step, **about):
    """Changes what a checkpoint holds beside the state, and makes it an earlier version's, without a manifest."""
    (step / "SHA256SUMS").unlink()
    path = step / "about" / "metadata"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({name: written[name] for name in ("train_seconds", "checksums")} | about))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A run and its checkpoints


@pytest.mark.slow
def test_the_newest_checkpoint_or_the_one_named_is_read_and_nothing_touched(run, model):
    before = contents(run)
    named = [(run, None, 10), (run, 2, 2), (str(run), 10, 10), (run / "checkpoints/10", None, 10)]
    for path, wanted, step in [*named, (run / "checkpoints/2", None, 2)]:
        weights = read(path, step=wanted)
        assert (weights.form, weights.step, weights.mask_threshold) == ("train", step, step / 20)
        assert weights.path == run / "checkpoints" / str(step)
        assert (weights.averaged, weights.classes) == (False, ["a", "b"])
        assert type(weights.config) is dict
        assert weights.config["dataset"]["name"] == "digits"
        chex.assert_trees_all_equal(weights.variables, small.random_variables(model, seed=step))
        chex.assert_trees_all_equal_shapes(get_variables(weights.model), get_variables(model))
        chex.assert_trees_all_equal(weights.state_dict(), to_torch(model, weights.variables))
    assert contents(run) == before


def test_a_step_that_is_not_there(refuses, run, tmp_path):
    with refuses(f"'{run}' has no checkpoint of step 3; its checkpoints are of the steps 2, 10"):
        read(run, step=3)
    for path in (run / "checkpoints/2", run / "config.json", tmp_path):
        with refuses(f"'{path}' has no checkpoint of step 2"):
            read(path, step=2)


def test_paths_may_be_relative(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / "2")
    for path, step in [(".", 2), ("../10", 10), ("../..", 10)]:
        assert read(path).step == step


def test_what_is_still_being_written_is_no_checkpoint(run, tmp_path):
    for name in ("3", "12", "20.orbax-checkpoint-tmp-7", "about"):
        (tmp_path / name).mkdir()
    assert checkpoint_steps(tmp_path) == [3, 12]
    assert checkpoint_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("log", [b"", b'{"step": 9, "mask_threshold": 0.02}\n', b"[1]\n\xff\n"])
def test_the_log_does_not_matter(run, tmp_path, log):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.jsonl").write_bytes(log)
    assert read(copy).mask_threshold == 0.5


def test_an_earlier_versions_threshold_is_the_logs_or_the_schedules_first(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    without_manifest(copy / "checkpoints" / "10")
    assert read(copy).mask_threshold == 0.25
    assert read(copy).classes is None
    assert "an earlier version's run" in caplog.text
    assert "for step 10 it is taken to be 0.25, its value at step 10 in metrics.jsonl" in caplog.text
    (copy / "metrics.jsonl").unlink()
    assert read(copy).mask_threshold == 0.02
    assert "the schedule's first value" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "missing", "about"])
def test_a_damaged_checkpoint_is_said_and_another_named(refuses, run, tmp_path, damage):
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / "checkpoints" / "10"
    largest = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[:-200])
    elif damage == "missing":
        largest.unlink()
    else:
        (step / "about" / "metadata").write_text("{")
    before = contents(copy)
    with refuses(str(step), "damaged", f"try '{copy / 'checkpoints' / '2'}'"):
        read(copy)
    assert contents(copy) == before


def test_other_arrays_than_were_saved_are_noticed(refuses, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / "checkpoints" / "10"
    checksums = json.loads((step / "about" / "metadata").read_text())["checksums"]
    without_manifest(step, checksums=checksums | {"batch_stats/head/bn/mean": 1})
    with refuses("checkpoints/10", "checksum of batch_stats/head/bn/mean"):
        read(copy)


@pytest.mark.slow
def test_the_moving_average_is_read_where_there_is_one(refuses, run, tmp_path, model):
    with refuses("checkpoints/10", "no moving average"):
        read(run, ema=True)
    variables, average = (small.random_variables(model, seed=seed) for seed in (3, 4))
    step = write_averages(tmp_path, run, variables, average)
    for ema, expected in [(True, average), (False, variables), (None, variables)]:
        weights = read(step, ema=ema)
        assert weights.averaged == bool(ema)
        chex.assert_trees_all_equal(weights.variables, expected)
    for train, expected in [({"ema_decay": 0.9}, average), ({"ema_decay": 0.9, "export": "raw"}, variables)]:
        change_config(tmp_path, train=train)
        chex.assert_trees_all_equal(read(step).variables, expected)


def test_what_is_neither(refuses, run, tmp_path):
    for path in (tmp_path, run / "checkpoints", tmp_path / "nowhere", tmp_path / "nowhere.safetensors", "/nowhere"):
        with refuses(f"'{path}' is neither a run's folder with checkpoints, one of its checkpoints/STEP, an inference"):
            read(path)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"model": 3, "mask": {}}', '{"model": {"name": "levit_128s"}}']
)
def test_a_config_that_is_missing_or_damaged(refuses, run, tmp_path, text):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "config.json").unlink() if text is None else (copy / "config.json").write_text(text)
    with refuses("config.json", "missing or damaged"):
        read(copy)


def test_configs_and_checkpoints_of_another_format(refuses, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    fields = read_config(copy)
    assert "format" not in fields
    change_config(copy, format=2, model=None)
    with refuses(f"'{copy / 'config.json'}' has format 2; this version reads format 1"):
        read(copy)
    (copy / "config.json").write_text(json.dumps(fields))  # an earlier version did not state it
    assert read(copy).config == fields
    step = copy / "checkpoints" / "10"
    without_manifest(step, format=3)
    write_manifest(epath.Path(step))
    with refuses(f"'{step}' has format 3; this version reads formats up to 2"):
        read(copy)


# Other kinds


def test_an_inference_folder(refuses, run, model, tmp_path):
    variables = small.random_variables(model, seed=10)
    save_inference(tmp_path / "inference", model, variables)
    for path in (tmp_path / "inference", tmp_path):  # a run that has no other
        weights = read(path, ema=False)
        assert (weights.path, weights.form, weights.model.spec.form) == (tmp_path / "inference", *["inference"] * 2)
        assert (weights.config, weights.mask_threshold, weights.step) == (None, None, None)
        chex.assert_trees_all_equal(weights.variables, load_inference(tmp_path / "inference")[1])
        with refuses(f"'{tmp_path / 'inference'}' holds no moving average"):
            read(path, ema=True)
        with refuses(str(weights.path), "in inference form, whose layers are folded"):
            weights.state_dict()
    copy = shutil.copytree(run, tmp_path / "run")
    save_inference(copy / "inference", model, variables)
    assert read(copy).form == "train"


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth"])
def test_a_foreign_file_names_no_model(refuses, run, model, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    variables = read(run).variables
    arrays = to_torch(model, variables)
    if suffix == "safetensors":
        save_file(arrays, path)
    elif suffix == "npz":
        np.savez(path, **arrays)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, path)
    weights = read(path)
    assert (weights.path, weights.model, weights.form, weights.config) == (path, None, None, None)
    chex.assert_trees_all_equal(weights.variables, arrays)
    chex.assert_trees_all_equal(from_torch(model, weights.state_dict()), variables)
    with refuses(f"'{path}' holds no moving average"):
        read(path, ema=True)


def test_shipped_weights_are_called_by_their_bare_name(refuses, model, tmp_path, monkeypatch):
    with refuses("'digts' is neither", "nor the name of shipped weights"):
        read("digts")
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    for folder, seed in [("weights/digits", 1), ("digits", 2)]:
        save_inference(tmp_path / folder, model, small.random_variables(model, seed=seed))
    own = load_inference("./digits")[1]
    for name, expected in [("digits", load_inference(tmp_path / "weights" / "digits")[1]), ("./digits", own)]:
        chex.assert_trees_all_equal(read(name).variables, expected)
        chex.assert_trees_all_equal(load_inference(name)[1], expected)
    chex.assert_trees_all_equal(read(tmp_path / "digits").variables, own)
    with refuses("'digit' is neither", "nor the name of shipped weights (digits)"):
        read("digit")


# What cannot be meant


@pytest.mark.parametrize("path", [None, 3, "", b"run", "a\0"])
def test_what_is_no_path(refuses, path):
    with refuses("a path must"):
        read(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"step": "65"}, "step must be an integer, or None for the newest, not '65'."),
        ({"step": 2.0}, "step must be an integer, or None for the newest, not 2.0."),
        ({"step": True}, "step must be an integer, or None for the newest, not True."),
        ({"ema": "yes"}, "ema must be True, False or None, not 'yes'."),
        ({"ema": 1}, "ema must be True, False or None, not 1."),
    ],
)
def test_arguments_of_another_type(refuses, run, arguments, sentence):
    with refuses(sentence):
        read(run, **arguments)
    assert read(run, step=np.int64(2)).step == 2


def test_the_home_folder_is_meant(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert read("~/run").step == 10
    assert read("~/run/checkpoints/2").step == 2


def test_what_is_missing_is_told_from_what_is_something_else(refuses, run, tmp_path):
    with refuses("nor the name of shipped weights (digits, fashion_mnist): there is nothing of this name."):
        read(tmp_path / "nowhere")
    with refuses("nor the name of shipped weights (digits, fashion_mnist): it is another folder."):
        read(tmp_path)


@pytest.mark.parametrize("name", ["0099", "00", "²", "٣", "99999999999", "7.tmp", "+5"])
def test_a_folder_that_no_run_has_named_is_no_checkpoint(run, tmp_path, name):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / name).mkdir()
    assert read(copy).step == 10


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model":' * 100_000, '{"model": NaN, "train": 3, "mask": 3}'])
def test_a_config_that_is_no_reasonable_json(refuses, run, tmp_path, text):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "config.json").write_text(text)
    with refuses(f"'{copy / 'config.json'}' is missing or damaged"):
        read(copy)
