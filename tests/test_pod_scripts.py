"""The steps of docs/tpu_pods.md, as their dry runs print them."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from castling_jax.training.config import field_names, load_config

ROOT = Path(__file__).parent.parent
STEPS = sorted((ROOT / "scripts" / "pod").glob("*.sh"))
SETTINGS = {
    "BUCKET": "gs://bucket",
    "ARCHIVES": "/archives",
    "TOPOLOGY": "v5e:16x16",
    "REPOSITORY": "https://host/code",
}


def dry_run(step, *flags, status=0, **settings):
    """The commands of a step, each a list of words; or what it says where it refuses."""
    environment = {word: os.environ[word] for word in ("PATH", "HOME")} | SETTINGS | settings
    script = ROOT / "scripts" / "pod" / f"{step}.sh"
    done = subprocess.run(
        [script, "--dry-run", *flags], env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else [shlex.split(line) for line in done.stdout.splitlines() if line[0] != "#"]


def on_workers(commands):
    """What is run on workers: pairs of a node's name and a shell's command."""
    return [
        (words[5], next(word for word in words if word.startswith("--command=")).removeprefix("--command="))
        for words in commands
        if words[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    ]


@pytest.mark.parametrize("step", [path.stem for path in STEPS if path.stem != "common"])
def test_every_step_has_a_dry_run_and_help(step):
    commands = dry_run(step)
    assert {words[0] for words in commands} <= {"gcloud", "curl", "python3", ".venv/bin/python"}
    helped = subprocess.run(
        [ROOT / "scripts" / "pod" / f"{step}.sh", "--help"], capture_output=True, text=True, check=True
    )
    assert f"{step}.sh [--dry-run]" in helped.stdout
    assert "BUCKET" in helped.stdout
    # What is run there is a shell's, whose syntax can be seen without running it.
    for _, command in on_workers(commands):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_module_and_configuration_of_the_steps_is_there():
    for step in STEPS:
        text = step.read_text()
        for module in re.findall(r"-m castling_jax\.([\w.]+)", text):
            assert (ROOT / "castling_jax" / f"{module.replace('.', '/')}.py").is_file()
        for config in re.findall(r"configs/\w+\.py:\w+", text):
            load_config(config.split(":")[0].replace("castle_pretrained", "deit"))
            assert (ROOT / config.split(":")[0]).is_file()


def test_training_is_started_on_every_slice_with_flags_that_there_are():
    started = on_workers(dry_run("train", "--config.train.batch_size=2048", SLICES="2", RUN="mine"))
    assert [node for node, _ in started] == ["castling-0", "castling-1"]
    assert started[0][1] == started[1][1]
    words = shlex.split(started[0][1])
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    assert flags["workdir"] == "gs://bucket/runs/mine"
    assert flags["config.mesh.replica"] == "2"
    assert flags["config.train.batch_size"] == "2048"
    fields = [flag.removeprefix("config.") for flag in flags if flag.startswith("config.")]
    assert set(fields) <= set(field_names())


def test_castling_starts_from_the_weights_that_were_copied():
    commands = dry_run("castle")
    weights = "gs://bucket/weights/deit_base_patch16_224.fb_in1k.safetensors"
    assert ["gcloud", "storage", "cp", "/tmp/deit_base_patch16_224.fb_in1k.safetensors", weights] in commands
    ((_, command),) = on_workers(commands)
    assert f"--config.init_from={weights}" in command
    assert f"--config.distillation.teacher={weights}" in command


def test_pods_are_asked_for_and_given_back():
    (create, _) = dry_run("create", SLICES="4", SPOT="0", TYPE="v5p-128")
    assert {"--node-count=4", "--node-prefix=castling", "--runtime-version=v2-alpha-tpuv5"} <= set(create)
    assert "--spot" not in create
    again = dry_run("resume")
    assert again[0] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "castling", *again[0][6:]]
    assert [words[4] for words in again if words[3] == "queued-resources"] == ["delete", "create", "describe"]


def test_a_setting_that_is_missing_or_wrong_is_named():
    assert "set BUCKET" in dry_run("train", status=2, BUCKET="")
    assert "BUCKET must start with gs://, not '/data'" in dry_run("watch", status=2, BUCKET="/data")
    assert "set ARCHIVES" in dry_run("prepare", status=2, ARCHIVES="")
    assert "set TOPOLOGY" in dry_run("report", status=2, TOPOLOGY="")
    assert "TYPE must start with" in dry_run("create", status=2, TYPE="v3-8")


def test_the_guide_has_every_step_and_no_other():
    named = set(re.findall(r"scripts/pod/(\w+)\.sh", (ROOT / "docs" / "tpu_pods.md").read_text()))
    assert named == {path.stem for path in STEPS} - {"common"}
