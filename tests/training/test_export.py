import json
import re
import shutil
import sys

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from castling_jax import load_inference, preprocess, to_inference
from castling_jax.convert import to_torch
from castling_jax.convert.inference_folder import MODEL_FILE, PAYLOADS, save_inference
from castling_jax.convert.run_folder import write_config
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import count_parameters
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.detection.task import Detection
from castling_jax.tools import convert
from castling_jax.training.card import CARD_FILE
from castling_jax.training.checkpoints import Checkpoints, Progress
from castling_jax.training.config import default_config
from castling_jax.training.export import held_out_images
from castling_jax.training.state import create_state
from tests.data.box_files import write_coco
from tests.models import small

LEVIT = {"name": "levit_128s", "distilled": True, "image_size": 32}
LEVIT |= {"embed_dim": (8, 12), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 4}
DEIT = {"name": "deit_micro", "depth": 1, "embed_dim": 32}


def write_run(folder, arguments, variables):
    config = default_config()
    config.model.update(arguments)
    folder.mkdir()
    write_config(folder, config.to_dict())
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(create_state(variables, optax.sgd(1e-3), 0), Progress(1.0))
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def levit(tmp_path_factory):
    model = abstract_model(num_classes=10, **LEVIT)
    variables = small.random_variables(model)
    return write_run(tmp_path_factory.mktemp("levit") / "run", LEVIT, variables), model, variables


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    model = abstract_model(num_classes=10, **DEIT)
    variables = small.random_variables(model)
    return write_run(tmp_path_factory.mktemp("deit") / "run", DEIT, variables), model, variables


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


def refusal(monkeypatch, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    message = caught.value.code
    assert isinstance(message, str) and message.endswith((".", "?", ")")) and "\n" not in message, message
    return message


@pytest.mark.slow
def test_what_becomes_of_every_parameter_is_told(levit, tmp_path, monkeypatch, capsys):
    folder, _, variables = levit
    run(monkeypatch, folder, tmp_path / "out")
    text = " ".join(capsys.readouterr().out.split())  # without the columns' widths
    assert text.startswith(f"levit_128s, castling, 32 pixels, 10 classes: {folder}/checkpoints/0, step 0")
    for line in (
        "params/stages/0/blocks/*/attn/softmax_branch/attention_biases - dropped with the softmax branch",
        "params/stages/0/blocks/*/attn/proj/ln/bn/scale - folded into linear",
        "params/head/linear/kernel float32[12, 10] float32[12, 10] averaged with the second head",
        "params/head_dist/linear/kernel float32[12, 10] - averaged into head",
        "params/head_dist/bn/scale float32[12] - folded into linear",
        "params/stem/conv1/linear/kernel float32[3, 3, 3, 1] float32[3, 3, 3, 1] folded with batch norm",
        "params/stem/conv1/linear/bias - float32[1] the batch norm's shift",
        "batch_stats/stem/conv1/bn/mean float32[1] - folded into linear",
        f"parameters {count_parameters(variables):,} {count_parameters(to_inference(variables)):,} ",
    ):
        # Between a name and a hyphen may stand how many there are, and their shape.
        assert re.search(re.escape(line).replace(r"\ \-\ ", r" [^-]*- "), text), line
    # The checkpoint's numpy arrays are folded in the place of jax's: to float32's rounding.
    chex.assert_trees_all_close(load_inference(tmp_path / "out")[1], to_inference(variables), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_checked_conversion_in_each_format(deit, tmp_path, monkeypatch, capsys, name):
    folder, _, variables = deit
    run(monkeypatch, folder / "checkpoints" / "0", tmp_path, f"--format={name}", "--check")
    text = capsys.readouterr().out
    assert "On 128 images of digits test:" in text
    assert re.search(r"at the mask threshold 0.02 the two forms' outputs differ by at most \d\.\de", text)
    assert re.search(r"kept, by layer: \d+\.\d\d%", text)
    assert "read back, give the same outputs" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CARD_FILE, MODEL_FILE, PAYLOADS[name]])
    if name != "stablehlo":
        chex.assert_trees_all_equal(load_inference(tmp_path)[1], to_inference(variables))


def test_a_program_of_pixels_is_checked_with_pixels(deit, tmp_path, monkeypatch, capsys):
    """The digits are floats, so that the check rounds them to 8 bits first."""
    folder, _, _ = deit
    run(monkeypatch, folder, tmp_path, "--format=stablehlo", "--uint8", "--check")
    assert "the written files, read back, give the same outputs" in capsys.readouterr().out
    assert json.loads((tmp_path / MODEL_FILE).read_text())["image_dtype"] == "uint8"
    assert "uint8 RGB pixels" in (tmp_path / CARD_FILE).read_text()


def test_what_cannot_take_pixels_is_refused(deit, tmp_path, monkeypatch):
    folder, model, variables = deit
    out = tmp_path / "out"
    for format in ("safetensors", "orbax"):
        assert refusal(monkeypatch, folder, out, "--uint8", f"--format={format}") == (
            f"only a program takes uint8 images: the format must be stablehlo, not {format}."
        )
    save_inference(tmp_path / "inference", model, variables)
    assert "does not say how an image becomes its model's input, so its program cannot take uint8" in refusal(
        monkeypatch, tmp_path / "inference", out, "--uint8", "--format=stablehlo"
    )
    assert not out.exists()


def test_an_inference_folder_is_cast(deit, tmp_path, monkeypatch, capsys):
    _, model, variables = deit
    (tmp_path / "run").mkdir()
    save_inference(tmp_path / "run" / "inference", model, variables)
    run(monkeypatch, tmp_path / "run", tmp_path / "out", "--bfloat16", "--check")
    text = capsys.readouterr().out
    assert "the source is in inference form already" in text
    assert re.search(r"bfloat16 parameters change them by at most \d\.\de-\d\d, and the answer for \d+ images", text)
    loaded_model, loaded = load_inference(tmp_path / "out")
    assert loaded_model.spec.param_dtype == "bfloat16"
    chex.assert_trees_all_equal(loaded, to_inference(variables, dtype=jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["castling", "softmax"])
def test_a_levits_two_forms_are_checked(tmp_path, monkeypatch, capsys, attention):
    arguments = LEVIT | {"attention": attention}
    variables = small.random_variables(abstract_model(num_classes=10, **arguments))
    run(monkeypatch, write_run(tmp_path / "run", arguments, variables), tmp_path / "out", "--check")
    text = capsys.readouterr().out
    differences = [float(number) for number in re.findall(r"differ by at most (\S+?);? ?\n?", text)]
    assert differences
    assert "read back, give the same outputs" in text


def test_numbers_that_are_none_fail_the_check_and_are_not_written(deit, tmp_path, monkeypatch):
    _, _, variables = deit
    params = variables["params"] | {"norm": {"scale": np.full(32, np.nan, np.float32), "bias": np.zeros(32)}}
    folder = write_run(tmp_path / "run", DEIT, {"params": params})
    assert "differ by nan" in refusal(monkeypatch, folder, tmp_path / "out", "--check")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_sentence(deit, tmp_path, monkeypatch):
    folder, model, variables = deit
    out = tmp_path / "out"
    assert "no moving average" in refusal(monkeypatch, folder, out, "--ema")
    assert "neither a run's folder" in refusal(monkeypatch, tmp_path / "nowhere", out)
    save_inference(tmp_path / "inference", model, variables)
    assert "no moving average" in refusal(monkeypatch, tmp_path / "inference", out, "--ema")
    payload = tmp_path / "inference" / PAYLOADS["safetensors"]
    payload.write_bytes(payload.read_bytes()[:-1])
    assert "damaged" in refusal(monkeypatch, tmp_path / "inference", out)
    np.savez(tmp_path / "weights.npz", **to_torch(model, variables))
    assert "does not say which model" in refusal(monkeypatch, tmp_path / "weights.npz", out)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(monkeypatch, folder, tmp_path / "file")
    assert not out.exists()


def test_the_help_says_what_each_format_is(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    for fragment in (*PAYLOADS, "load_inference", "jax.export.deserialize", "--bfloat16", "checkpoints/STEP"):
        assert fragment in text


# Places


def listed(folder):
    return sorted(folder.rglob("*"))


def test_a_run_is_no_place_for_its_conversion(levit, monkeypatch):
    folder, _, _ = levit
    before = listed(folder)
    places = (folder, folder / "checkpoints", folder / "checkpoints" / "0", folder / "checkpoints" / "0" / "new")
    for out in (*places, f"{folder}/../{folder.name}"):
        assert f"'{out}' belongs to a run: give a folder for the conversion" in refusal(monkeypatch, folder, out)
    assert listed(folder) == before


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/proc/out"):
        assert f"'{out}'" in refusal(monkeypatch, "nowhere", out)
    assert listed(tmp_path) == [tmp_path / "file"]


def test_an_unfinished_run_is_said_and_only_what_was_written_is_counted(levit, tmp_path, monkeypatch, capsys):
    folder, _, _ = levit
    out = tmp_path / "home" / "out"
    out.mkdir(parents=True)
    (out / "notes").write_bytes(bytes(10_000_000))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, folder, "~/out")
    text = capsys.readouterr().out
    assert "This run is not finished: the conversion takes its step 0, whose mask threshold is 0.02." in text
    size = sum((out / name).stat().st_size for name in (MODEL_FILE, PAYLOADS["safetensors"]))
    assert f"Wrote {out}: variables.safetensors, model.json and README.md, {size / 1e6:,.2f} MB." in text
    (folder / "summary.json").write_text("{}")
    try:
        run(monkeypatch, folder, out)
    finally:
        (folder / "summary.json").unlink()
    assert "not finished" not in capsys.readouterr().out


def test_a_group_of_fields_that_no_version_has(levit, tmp_path, monkeypatch):
    copy = shutil.copytree(levit[0], tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"optimiser": {"learning_rate": 3}}))
    assert "unknown group of fields in the run's config.json 'optimiser': did you mean 'optimizer'?" in refusal(
        monkeypatch, copy, tmp_path / "out"
    )


def test_a_corrupt_image_is_left_out_of_the_comparison_as_in_the_run(tmp_path, refuses):
    """A detector's, with one of four images gone: the run's own limit counts, and not that of no corrupt image."""
    (write_coco(tmp_path, "val") / "val" / "001.jpg").unlink()
    config = default_config()
    config.model.name = "picodet_s"
    config.dataset.update({"name": f"coco:{tmp_path}", "eval_split": "val"})
    preprocessing = Preprocessing(32, crop_mode="squash", crop_ratio=1.0)
    images = held_out_images(Detection, preprocessing, config)
    assert images.dtype == np.uint8
    expected = preprocess(sorted((tmp_path / "val").iterdir()), preprocessing)
    np.testing.assert_array_equal(model_input(images, preprocessing), expected)
    config.dataset.max_corrupt_share = 0.0
    with refuses("1 of the 4 images read so far are corrupt", "max_corrupt_share = 0 allows"):
        held_out_images(Detection, preprocessing, config)
