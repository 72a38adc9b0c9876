"""What earlier versions wrote is read: a run, and what was converted from it, as two versions left them."""

import json
import shutil
import tarfile

import chex
import jax
import jax.export
import numpy as np
import pytest
from etils import epath

from castling_jax import apply, load_inference, to_inference
from castling_jax.convert import read
from castling_jax.convert.checkpoint import checkpoint_steps
from castling_jax.convert.run_folder import CONFIG_FILE, read_config
from castling_jax.training.config_files import run_config
from castling_jax.training.evaluate_run import evaluate_checkpoint
from castling_jax.training.run import run as training_run
from castling_jax.training.state import parameters_sha256
from tests.conftest import GOLDEN
from tests.models import small

VERSIONS = ("first", "second")
STEPS = 44


@pytest.fixture(scope="module", params=VERSIONS)
def version(request, tmp_path_factory):
    """(name, folder): the folder holds run, safetensors, orbax and stablehlo."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(GOLDEN / "formats" / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return request.param, folder


def summary_of(folder):
    return json.loads((folder / "run" / "summary.json").read_text())


def test_each_file_states_its_format_or_is_of_the_first(version):
    name, folder = version
    about = f"run/checkpoints/{STEPS}/about/metadata"
    files = {file: json.loads((folder / file).read_text()) for file in ("run/config.json", about)}
    stated = {"first": (None, None), "second": (1, 2)}[name]
    assert tuple(content.get("format") for content in files.values()) == stated
    for file in ("run/inference", "safetensors", "orbax", "stablehlo"):
        assert json.loads((folder / file / "model.json").read_text())["format"] == 1


def test_a_runs_checkpoint_is_read_bit_by_bit(version):
    name, folder = version
    weights = read(folder / "run")
    assert (weights.form, weights.step, weights.averaged, weights.mask_threshold) == ("train", STEPS, True, 1)
    assert weights.classes == {"first": None, "second": [str(digit) for digit in range(10)]}[name]
    assert (weights.model.spec.name, weights.model.spec.num_classes) == ("levit_128s", 10)
    assert weights.config["train"]["ema_decay"] == 0.9
    raw = read(folder / "run", ema=False)
    assert parameters_sha256(raw.variables["params"]) == summary_of(folder)["parameters_sha256"]


@pytest.mark.slow
def test_inference_folders_hold_the_runs_variables_switched(version):
    _, folder = version
    expected = jax.tree.map(np.asarray, to_inference(read(folder / "run").variables))
    for path in ("run/inference", "safetensors", "orbax"):
        weights = read(folder / path)
        assert (weights.form, weights.model.spec.name) == ("inference", "levit_128s")
        chex.assert_trees_all_equal(weights.variables, load_inference(folder / path)[1])
        # Folded by XLA or by NumPy, on another machine: a rounding or two of float32 numbers of order one.
        chex.assert_trees_all_close(weights.variables, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_program_gives_the_models_logits(version):
    _, folder = version
    program = jax.export.deserialize(bytearray((folder / "stablehlo" / "program.stablehlo").read_bytes()))
    model, variables = load_inference(folder / "safetensors")
    images = small.random_images(3, 32, 32)
    # Sums of up to some hundred terms of order one, in another order.
    chex.assert_trees_all_close(program.call(images), apply(model, variables, images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_runs_figures_are_its_summarys(version):
    _, folder = version
    figures = evaluate_checkpoint(folder / "run", read_config(folder / "run")["mesh"]).figures
    summary = summary_of(folder)
    names = [name for name in summary if name.endswith(("accuracy_train_form", "accuracy_inference_form", "eval_loss"))]
    assert {"accuracy_train_form", "accuracy_inference_form", "eval_loss"} <= set(names)
    # Of 360 images none is so near to two classes that float32's rounding on another machine moves it; if one is,
    # both accuracies differ by a 360th.
    assert {name: figures[name] for name in names} == pytest.approx({name: summary[name] for name in names}, rel=1e-5)
    assert figures["max_difference"] <= 1e-5
    assert (figures["step"], figures["mask_threshold"]) == (summary["steps"], summary["mask_threshold"])


@pytest.mark.slow
def test_a_run_goes_on(version, tmp_path, capsys):
    _, folder = version
    run = epath.Path(shutil.copytree(folder / "run", tmp_path / "run"))
    fields = json.loads((run / CONFIG_FILE).read_text())
    fields["train"]["epochs"] = 3  # one more than it had
    (run / CONFIG_FILE).write_text(json.dumps(fields))
    (run / "summary.json").unlink()
    figures = training_run(run_config(read_config(run)), run).figures
    assert f"Going on from step {STEPS} of 66" in capsys.readouterr().out
    assert figures["steps"] == 66
    assert checkpoint_steps(run / "checkpoints")[-1] == 66
    assert read(run).step == 66
    assert figures["raw_eval_loss"] < summary_of(folder)["eval_loss"]
