"""What a run says: the block before its first step, a line for each evaluation, and a bar or lines."""

import re
import sys

import pytest
from PIL import Image

from castling_jax.training import summary
from castling_jax.training.config import default_config
from castling_jax.training.console import rate_text
from castling_jax.training.run import run


def small_config(**model):
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 1, "embed_dim": 32} | model)
    config.train.update({"epochs": 2, "batch_size": 128})
    config.optimizer.warmup_epochs = 0.5
    config.mask.update({"begin": 0.1, "end": 0.5})
    config.logging.update({"every_steps": 10, "tensorboard": False})
    return config


def told(config, workdir, capsys, monkeypatch):
    monkeypatch.setattr(summary, "measure_forms", lambda *_: None)
    run(config, workdir)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("rate", "said"), [(0.1377, "0.14"), (1.5, "1.5"), (9.97, "10"), (12.4, "12"), (4321, "4,321")]
)
def test_slow_steps_have_a_rate_too(rate, said):
    assert rate_text(rate) == said


@pytest.mark.slow
def test_without_a_terminal_there_are_plain_lines(tmp_path, capsys, monkeypatch):
    said = told(small_config(), tmp_path / "run", capsys, monkeypatch)
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0] == "data    digits: train 1,437, test 360 images of 10 classes"
    assert re.fullmatch(
        r"model   deit_micro, castling, 8 pixels: [\d,]+ parameters, [\d.]+ M MACs .* training form\)", lines[1]
    )
    assert lines[2] == "steps   22 of 128 images, 11 an epoch: 2 epochs"
    assert re.fullmatch(r"devices 1 x cpu, 1 process; mesh: one device", lines[3])
    assert lines[4:6] == [f"folder  {tmp_path / 'run'}", "compiling the first step"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 10 of 22", "step 20 of 22", "step 22 of 22"]
    assert all(re.fullmatch(r"step .*: loss \d\.\d{4}, [\d,]+ images/s, 0:\d\d:\d\d left", line) for line in steps)
    evaluations = [line for line in lines if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in evaluations] == ["epoch 1, step 11", "epoch 2, step 22"]
    accuracy = "accuracy held out .* % in training form, .* % in inference form"
    shape = f"epoch .*: loss .*, held out .*; {accuracy}; mask threshold .*, density .*"
    assert all(re.fullmatch(shape, line) for line in evaluations)


@pytest.mark.slow
def test_images_in_files_have_a_size_and_other_files_are_counted(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (40, 30), 25 * number).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "a" / "notes.txt").touch()
    config = small_config()
    config.dataset.name, config.train.batch_size = f"folder:{tmp_path / 'data'}", None
    lines = told(config, tmp_path / "run", capsys, monkeypatch).splitlines()
    assert lines[0] == f"data    folder:{tmp_path / 'data'}: train without 10% 18, 10% of train 2 images of 2 classes"
    assert lines[1] == "images  the first has 40 x 30 pixels, and the model sees 8 x 8"
    assert lines[2] == "skipped files that are no images, by their names: 1 .txt"
    assert "steps   18 of 2 images, 9 an epoch: 2 epochs" in lines


@pytest.mark.slow
def test_one_form_has_one_accuracy(tmp_path, capsys, monkeypatch):
    said = told(small_config(attention="linear_angular"), tmp_path / "run", capsys, monkeypatch)
    assert re.search(r"epoch 2, step 22: loss [\d.]+, held out [\d.]+; accuracy held out [\d.]+ %\n", said)
    assert "training form" not in said


@pytest.mark.slow
def test_a_terminal_has_a_bar_and_no_lines_of_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = told(small_config(attention="linear_angular"), tmp_path / "run", capsys, monkeypatch)
    assert "22/22" in said and "loss=" in said
    assert not re.search(r"^step ", said, re.MULTILINE)
    assert "epoch 2, step 22: loss" in said


@pytest.mark.slow
def test_progress_may_be_left_out(tmp_path, capsys, monkeypatch):
    config = small_config(attention="linear_angular")
    config.logging.progress = False
    assert told(config, tmp_path / "run", capsys, monkeypatch) == ""
