"""The doctor's lines: what is well, what is not, and what to do."""

import importlib.metadata

import pytest

from castling_jax import doctor
from castling_jax.errors import InputError
from castling_jax.models.registry import abstract_model
from castling_jax.ops.tpu import linear_angular
from castling_jax.tools import doctor as command


def test_versions_beside_those_that_were_tried(monkeypatch):
    assert all(line.ok for line in doctor.versions())
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1" if name == "jax" else version(name))
    (line,) = (line for line in doctor.versions() if not line.ok)
    assert str(line).startswith("NO  jax                  0.4.1: pip install 'jax")


def test_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    nothing, runs = doctor.data()
    assert (nothing.ok, runs.ok) == (None, True)
    assert "nothing is prepared" in nothing.finding
    (tmp_path / "data" / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "data" / "mnist" / "3.0.1" / "dataset_info.json").touch()
    (tmp_path / "runs").touch()
    prepared, runs = doctor.data()
    assert prepared.finding.endswith("prepared: mnist")
    assert not runs.ok
    assert "is a file" in runs.finding
    assert {line.subject for line in doctor.devices()} >= {"devices", "memory", "disk"}


@pytest.mark.slow
def test_the_round_trip_of_ten_steps(capsys):
    lines = list(doctor.round_trip())
    assert [line.subject for line in lines] == ["train", "castle", "convert", "predict"]
    assert all(line.ok for line in lines)
    assert lines[0].finding.startswith("10 steps")


def test_what_breaks_is_a_line_and_a_status(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == "1 lines begin with NO."
    assert "NO  train                RuntimeError: no such device\n" in capsys.readouterr().out


def test_a_tpu_is_needed_for_its_part():
    with pytest.raises(InputError, match=r"--tpu is for a TPU, and JAX has \d x cpu here"):
        next(doctor.examine_tpu())


@pytest.mark.slow  # interpreted kernels take long to compile
def test_kernels_are_compared_and_times_measured(monkeypatch):
    small = {"depth": 1, "embed_dim": 16, "num_heads": 1, "patch_size": 4}
    monkeypatch.setattr(doctor, "abstract_model", lambda name, **options: abstract_model(name, **small, **options))
    monkeypatch.setattr(doctor, "timed", lambda chip: [])
    lines = list(doctor.examine_tpu(["deit_micro"], implementation="pallas"))
    assert all(line.ok for line in lines)
    assert {line.subject for line in lines} == {"linear_angular", "linear_angular_block", "masked_softmax"}
    sound = linear_angular.linear_angular
    monkeypatch.setattr(linear_angular, "linear_angular", lambda *args, **options: 2 * sound(*args, **options))
    lines = list(doctor.examine_tpu(["deit_micro"], implementation="pallas"))
    assert {line.subject for line in lines if line.ok is False} == {"linear_angular"}


@pytest.mark.slow
def test_a_layer_is_timed():
    lines = list(doctor.timed(None, tokens=5, batch=1))
    assert len(lines) == 4
    for line in lines:
        assert line.ok is None
        assert "measured " in line.finding
        assert line.finding.endswith("ms, no estimate for this chip")
