"""The steps of docs/tpu_pods.md: as their dry runs print them, and with a gcloud that only says what it is told to."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from castling_jax.training.config import FIELDS
from castling_jax.training.config_files import load_config

ROOT = Path(__file__).parent.parent
STEPS = sorted((ROOT / "scripts" / "pod").glob("*.sh"))
SETTINGS = {
    "BUCKET": "gs://bucket",
    "ARCHIVES": "/archives",
    "TOPOLOGY": "v5e:16x16",
    "REPOSITORY": "https://host/code",
    "PYTHON": "/nowhere/python",  # the configuration is checked in the tests that say so
}


def run_step(step, *flags, **settings):
    environment = {word: os.environ[word] for word in ("PATH", "HOME")} | SETTINGS | settings
    script = ROOT / "scripts" / "pod" / f"{step}.sh"
    return subprocess.run(
        [script, *flags], env=environment, capture_output=True, text=True, check=False, cwd="/", timeout=60
    )


def dry_run(step, *flags, status=0, **settings):
    """The commands of a step, each a list of words; or what it says where it refuses."""
    done = run_step(step, *flags, "--dry-run", **settings)
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
            load_config(config)
            assert (ROOT / config.split(":")[0]).is_file()


def test_training_is_started_on_every_slice_with_flags_that_there_are():
    given = ("--config.train.batch_size=2048", "--config.dataset.accept_changes")
    started = on_workers(dry_run("train", *given, SLICES="2", RUN="mine"))
    assert [node for node, _ in started] == ["castling-0", "castling-1"]
    assert started[0][1] == started[1][1]
    words = shlex.split(started[0][1])
    flags = {name: value for name, _, value in (word[2:].partition("=") for word in words if word.startswith("--"))}
    assert flags["workdir"] == "gs://bucket/runs/mine"
    assert flags["config.mesh.replica"] == "2"
    assert flags["config.train.batch_size"] == "2048"
    fields = [flag.removeprefix("config.") for flag in flags if flag.startswith("config.")]
    assert set(fields) <= FIELDS.keys()


def test_castling_starts_from_the_weights_that_were_copied():
    commands = dry_run("castle")
    weights = "gs://bucket/weights/deit_base_patch16_224.fb_in1k.safetensors"
    assert ["gcloud", "storage", "cp", "/tmp/deit_base_patch16_224.fb_in1k.safetensors", weights] in commands
    ((_, command),) = on_workers(commands)
    assert f"--config.init_from={weights}" in command
    assert f"--config.distillation.teacher={weights}" in command
    said = dry_run("castle", status=2, CONFIG="configs/deit.py:base")
    assert "must be one of configs/castle_pretrained.py, which has a teacher, not 'configs/deit.py:base'" in said


def test_pods_are_asked_for_and_given_back():
    (create, _) = dry_run("create", SLICES="4", SPOT="0", TYPE="v5p-128")
    assert {"--node-count=4", "--node-prefix=castling", "--runtime-version=v2-alpha-tpuv5"} <= set(create)
    assert "--spot" not in create
    again = dry_run("resume")
    assert again[0] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "castling", *again[0][6:]]
    assert [words[4] for words in again if words[3] == "queued-resources"] == ["delete", "create", "describe"]


GCLOUD = """#!/usr/bin/env bash
# The first line of a file is its answer, and goes, unless it is the last; a line that starts with ! is an error.
cd FOLDER
echo "$*" >> calls
next() {
    line=$(head -n 1 "$1")
    [ "$(wc -l < "$1")" = 1 ] || sed -i 1d "$1"
    [ "${line:0:1}" != ! ] || { echo "${line:1}" >&2; exit 255; }
    echo "$line"
}
case "$*" in
    "storage ls"*) next looks ;;
    *describe*) next states ;;
    *"echo running"*) next answers ;;
    *nohup*) next starts ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs resume.sh with a gcloud of our own; returns its status, what it asked of pods, and what it said."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "gcloud").write_text(GCLOUD.replace("FOLDER", shlex.quote(str(tmp_path))))
    (bin_folder / "sleep").write_text("#!/usr/bin/env bash\n")
    for program in bin_folder.iterdir():
        program.chmod(0o755)

    def resume(*, looks, states=("ACTIVE",), answers=("running",), starts=("started",)):
        for name, lines in {"looks": looks, "states": states, "answers": answers, "starts": starts}.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        done = run_step("resume", "--config.train.epochs=9", PATH=f"{bin_folder}:{os.environ['PATH']}")
        words = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
        made = [w[3] for w in words if w[2:3] == ["queued-resources"] and w[3] != "describe"]
        started = [w for w in words if "nohup" in w]
        assert all("--config.train.epochs=9" in w for w in started)
        return done.returncode, [*made, *["start"] * len(started)], done.stdout + done.stderr

    return resume


def test_a_run_that_goes_on_is_let_be_until_it_is_finished(cloud):
    status, asked, said = cloud(looks=["!none", "!none", "!none", "summary.json"])
    assert (status, asked) == (0, [])
    assert "finished" in said


def test_a_question_without_an_answer_touches_no_pod(cloud):
    states = ["!the network is down", "ACTIVE"]
    status, asked, said = cloud(looks=["!none"] * 3 + ["there"], states=states, answers=["!no ssh", "running"])
    assert (status, asked) == (0, [])
    assert "the network is down" in said
    assert "Worker 0 does not answer" in said


@pytest.mark.parametrize(
    ("state", "made"), [("SUSPENDED", ["delete", "create"]), ("!NOT_FOUND: it is gone", ["create"])]
)
def test_a_pod_that_was_taken_away_is_asked_for_again(cloud, state, made):
    assert cloud(looks=["!none", "!none", "there"], states=[state, "ACTIVE"])[:2] == (0, [*made, "start"])


def test_what_fails_on_the_way_is_tried_again(cloud):
    # The request fails while it is waited for; then the pod is there, and goes away as the run is started.
    states = ["SUSPENDED", "WAITING", "FAILED", "FAILED", "ACTIVE", "ACTIVE"]
    status, asked, _ = cloud(
        looks=["!none"] * 4 + ["there"], states=states, answers=["ended", "running"], starts=["!gone", "started"]
    )
    assert (status, asked) == (0, ["delete", "create", "delete", "create", "start", "start"])


def test_a_run_that_would_only_end_the_same_way_again_is_not_started_again(cloud):
    status, asked, said = cloud(looks=["!none"], answers=["running", "ended 3"])
    assert (status, asked) == (3, [])
    assert "the same command would only do so again: watch.sh shows why" in said


def test_a_run_that_ends_by_itself_is_started_again_and_not_for_ever(cloud):
    status, asked, said = cloud(looks=["!none"], answers=["ended 1"])
    assert (status, asked) == (1, ["start"] * 3)
    assert "has ended 4 times" in said


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="workers have it; this machine has not")
def test_a_start_returns_at_once_and_is_one(tmp_path):
    """What train.sh and stop.sh run on a worker, run here, where main.py only waits."""
    settings = {"BUCKET": f"gs://bucket-{os.getpid()}", "HOME": str(tmp_path)}
    code = tmp_path / "castling_jax"
    (code / ".venv" / "bin").mkdir(parents=True)
    (code / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (code / "main.py").write_text("import time\nprint('it trains', flush=True)\ntime.sleep(600)\n")
    ((_, start),) = on_workers(dry_run("train", **settings))
    ((_, stop),) = on_workers(dry_run("stop", **settings))

    def worker(command):
        # With its output in a pipe, as ssh has it: this returns when nothing holds the pipe.
        return subprocess.run(
            ["bash", "-c", command],
            env=os.environ | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            check=True,
        ).stdout

    try:
        assert worker(start) == ""
        assert "it trains\n" in (worker("sleep 0.1; cat train.log") for _ in range(100))  # a busy machine takes a while
        assert worker(start) == "it runs already\n"
    finally:
        assert worker(stop) == ""
    assert "nothing runs\n" in (worker(stop) for _ in range(100))
    # What resume.sh asks for: main.py's status, here that of SIGTERM, which it does not hear.
    assert "143\n" in (worker("sleep 0.1; cat train.status || true") for _ in range(100))


def test_a_setting_that_is_missing_or_wrong_is_named():
    assert "set BUCKET" in dry_run("train", status=2, BUCKET="")
    assert "BUCKET must start with gs://, not '/data'" in dry_run("watch", status=2, BUCKET="/data")
    assert "set ARCHIVES" in dry_run("prepare", status=2, ARCHIVES="")
    assert "set TOPOLOGY" in dry_run("report", status=2, TOPOLOGY="")
    assert "TYPE must start with" in dry_run("create", status=2, TYPE="v3-8")
    assert "SLICES must be a number from 1 on, not '0'" in dry_run("train", status=2, SLICES="0")


@pytest.mark.parametrize(
    ("step", "setting", "value"),
    [
        ("train", "RUN", "a b"),
        ("stop", "RUN", "it's"),
        ("export", "RUN", "$(reboot)"),
        ("watch", "BUCKET", "gs://my bucket"),
        ("install", "BUCKET", "gs://x;reboot"),
        ("install", "REVISION", "main && reboot"),
        ("create", "NAME", "my pod"),
    ],
)
def test_what_a_workers_shell_would_read_otherwise_is_refused(step, setting, value):
    said = dry_run(step, status=2, **{setting: value})
    assert said.startswith(f"{step}.sh: {setting} must be ")
    assert said.endswith(f"not '{value}'.\n")


@pytest.mark.parametrize(
    ("bucket", "mounted"), [("gs://bucket", "bucket"), ("gs://bucket/a/b", "--only-dir a/b bucket")]
)
def test_a_bucket_or_a_folder_in_it_is_mounted(bucket, mounted):
    (command,) = [command for _, command in on_workers(dry_run("install", BUCKET=bucket)) if "mountpoint" in command]
    assert f"gcsfuse -o ro --implicit-dirs {mounted} /mnt/castling)" in command


def test_a_repositorys_address_is_quoted():
    (command, *_) = [command for _, command in on_workers(dry_run("install", REPOSITORY="https://host/my code"))]
    assert "https://host/my code" in shlex.split(command)


@pytest.mark.parametrize("flag", ["--dryrun", "--workdir=x", "--config=deit", "more"])
def test_a_start_takes_fields_alone(flag):
    said = dry_run("train", flag, status=2)
    assert said.startswith(f"train.sh: there is no flag '{flag}', only --config.GROUP.FIELD=VALUE")


@pytest.mark.slow
def test_fields_are_checked_before_workers_are_asked():
    done = run_step("train", "--dry-run", "--config.optimizer.lr=1", PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown config field 'optimizer.lr': did you mean 'optimizer.learning_rate'?" in done.stderr
    done = run_step("train", "--dry-run", "--config.train.epochs=9", PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "The configuration is valid.\n")


@pytest.mark.parametrize("step", ["create", "delete", "install", "prepare", "stop", "watch"])
def test_a_mistyped_flag_does_nothing(step):
    done = run_step(step, "--dryrun", PATH="/usr/bin:/bin")  # where there is no gcloud
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{step}.sh: there is no flag '--dryrun', only --dry-run and --help.\n"


def test_the_guide_has_every_step_and_no_other():
    named = set(re.findall(r"scripts/pod/(\w+)\.sh", (ROOT / "docs" / "tpu_pods.md").read_text()))
    assert named == {path.stem for path in STEPS} - {"common"}
