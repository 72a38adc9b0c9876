"""A run in a bucket, by the same command as one on disk: against a Google Cloud Storage in memory."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from castling_jax import InputError, load_inference, storage
from castling_jax.data.sources import find_splits, load_dataset
from castling_jax.training import export
from tests.data.box_files import write_coco, write_voc
from tests.training import fake_gcs

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.model.depth=1",
    "--config.model.embed_dim=32",
    "--config.train.epochs=2",
    "--config.optimizer.warmup_epochs=0.5",
    "--config.checkpoint.every_steps=10",
    "--config.logging.every_steps=5",
]
needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: pip install gcsfs"
)


@pytest.fixture
def server(monkeypatch):
    with fake_gcs.serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # programs are to be kept in the bucket
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # but each of them is a request
        yield server


def command(workdir):
    return [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *SMALL]


def run(workdir):
    return subprocess.run(command(workdir), capture_output=True, text=True, timeout=600)


def kill_when(workdir, server, name):
    """Starts the run and kills it, with no warning, once there is an object whose name starts with `name`."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(workdir), **quiet) as process:
        while process.poll() is None and not any(key.startswith(name) for key in list(server.objects)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)


def steps_of(text):
    return [json.loads(line)["step"] for line in text.splitlines()]


@needs_gcsfs
@pytest.mark.slow
def test_run_in_a_bucket_is_killed_and_damaged_and_ends_as_one_on_disk(server, tmp_path, capsys):
    on_disk = run(tmp_path / "run")
    assert on_disk.returncode == 0, on_disk.stderr
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())

    workdir = "gs://bucket/run"
    # Half-way through its first checkpoint, which then counts for nothing, and after its third.
    kill_when(workdir, server, "run/checkpoints/10/state/")
    assert "run/checkpoints/10/commit_success.txt" not in server.objects
    kill_when(workdir, server, "run/checkpoints/30/commit_success.txt")
    largest = max(
        (name for name in server.objects if name.startswith("run/checkpoints/30/state/")),
        key=lambda name: len(server.objects[name][0]),
    )
    data, generation = server.objects[largest]
    server.objects[largest] = data[: len(data) // 2], generation
    last = run(workdir)
    assert last.returncode == 0, last.stderr
    assert "It was moved to 'gs://bucket/run/checkpoints_damaged/30'" in last.stderr
    assert "Going on from step 20 of 44 in gs://bucket/run." in last.stdout
    assert largest.replace("checkpoints", "checkpoints_damaged") in server.objects

    summary = json.loads(server.objects["run/summary.json"][0])
    assert summary["parameters_sha256"] == expected["parameters_sha256"]
    assert summary["files"]["picture"] == "gs://bucket/run/training.png"
    written = server.objects["run/metrics.jsonl"][0].decode()
    assert steps_of(written) == steps_of((tmp_path / "run" / "metrics.jsonl").read_text())
    assert any(name.startswith("run/tensorboard/events") for name in server.objects)
    assert any(name.startswith("run/compiled/jit_step") for name in server.objects)
    assert "This run is finished" in run(workdir).stdout
    assert not any(tmp_path.glob("gs*"))

    # And what reads a run: twice to the same place, the second time in another format.
    for format in ("orbax", "orbax", "safetensors"):
        arguments = {"format": format, "ema": False, "bfloat16": False, "check": True}
        export.convert(epath.Path(workdir), epath.Path("gs://bucket/out"), **arguments)
        assert "read back, give the same outputs" in capsys.readouterr().out
    assert {name for name in server.objects if name.startswith("out/")} == {
        "out/README.md",
        "out/model.json",
        "out/variables.safetensors",
    }


@needs_gcsfs
def test_bucket_out_of_reach_is_one_sentence(server, refuses, monkeypatch):
    with refuses("there is no bucket 'gs://other'"):
        storage.reach_bucket("gs://other/run")
    server.objects["x"] = b"", 1
    monkeypatch.setattr(server, "bucket_status", 403)
    with refuses("the bucket 'gs://bucket' cannot be reached (403 GET", "allowed storage.buckets.get?"):
        storage.reach_bucket("gs://bucket/run", for_a_run=True)
    with refuses("'gs://bucket/nothing' is not an inference folder"):
        load_inference("gs://bucket/nothing")


def test_bucket_without_gcsfs_is_one_sentence(refuses, monkeypatch):
    def exists(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", exists)
    with refuses("'gs://bucket/run' is in a bucket, which needs gcsfs: pip install gcsfs"):
        load_inference("gs://bucket/run")
    storage.reach_bucket("runs/digits")


def test_paths_in_buckets_are_absolute():
    assert os.fspath(storage.absolute(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert os.fspath(storage.absolute(epath.Path("run"))) == str(Path.cwd() / "run")


@needs_gcsfs
@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_data_with_boxes_is_read_from_a_bucket(server, tmp_path, kind):
    {"coco": write_coco, "voc": write_voc}[kind](tmp_path / "data")
    storage.copy_folder(epath.Path(tmp_path / "data"), epath.Path("gs://bucket/data"))
    here, there = f"{kind}:{tmp_path / 'data'}", f"{kind}:gs://bucket/data"
    assert find_splits(here) == find_splits(there)
    split, _ = find_splits(here)
    expected, found = load_dataset(here, split), load_dataset(there, split)
    assert found.contents() == expected.contents()
    assert found.describe(0).startswith("'gs://bucket/data/")
    for index in range(len(expected)):
        assert found[index]["image"] == expected[index]["image"]
    (epath.Path("gs://bucket/data") / found.folder.name / found.files[0]).unlink()
    with pytest.raises(InputError, match="the file cannot be read"):
        found[0]
