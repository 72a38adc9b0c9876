"""The command line as a user meets it: in a process of its own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castling_jax.convert.checkpoint import checkpoint_steps
from castling_jax.errors import DeterministicError, InputError
from castling_jax.tools import train
from castling_jax.training import process
from castling_jax.training.config import FIELDS

ROOT = Path(__file__).parent.parent
SMALL = [
    "--config.model.depth=1",
    "--config.model.embed_dim=32",
    "--config.train.epochs=6",
    "--config.optimizer.warmup_epochs=1",
    "--config.checkpoint.every_steps=5",
    "--config.evaluation.every_epochs=3",
]


def command(workdir, *arguments):
    return [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *arguments]


# Imports what main.py does once; each line of its input is a command, which a child of its own runs.
SERVER = """
import json, os, sys
import main
from castling_jax.training import process

for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["main.py", *arguments]
    status = 0
    try:
        main.main()
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):  # a sentence
            print(status, file=sys.stderr)
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@pytest.fixture(scope="module")
def mistaken():
    """mistaken(workdir, *arguments) is run(workdir, *arguments), for what ends before it computes anything."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:

        def start(workdir, *arguments):
            folder = workdir.parent / "output"
            folder.mkdir(exist_ok=True)
            server.stdin.write(json.dumps([str(folder), [f"--workdir={workdir}", *arguments]]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            said = [(folder / name).read_text() for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(arguments, status, *said)

        yield start
        server.stdin.close()


def run(workdir, *arguments):
    return subprocess.run(command(workdir, *arguments), capture_output=True, text=True, cwd=workdir.parent, timeout=600)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--config.mask.start=1",
            "unknown config field 'mask.start': did you mean 'mask.start_threshold'? (known: mask.kind, mask.schedule, "
            "mask.start_threshold, mask.begin, mask.end)",
        ),
        ("--config=configs/nope.py", "there is no configuration file 'configs/nope.py'."),
        (
            "--config=digit",
            "unknown configuration 'digit': did you mean 'digits'? (known: ade20k, camvid, castle_pretrained, cells, "
            "deit, deit_384, digits, fashion_mnist, folder, images, levit, mae, mae_finetune, masks, mvitv2, picodet)",
        ),
        (
            "--config.train.epochs=many",
            "flag --config.train.epochs=many: invalid literal for int() with base 10: 'many'",
        ),
        ("--wrkdir=x", "unknown flag --wrkdir: did you mean --workdir?"),
        ("--learning_rate=1", "unknown flag --learning_rate: did you mean --config.optimizer.learning_rate?"),
        ("more", "unexpected argument 'more'; --help lists what this command takes."),
        ("--profile=5", "--profile must be FIRST:LAST, such as 100:104, not '5'."),
        ("--num_processes=2", "--coordinator, --num_processes and --process_id go together: give all three or none."),
        (
            "--config.mesh.fsdp=3",
            "config.mesh with replica = 1, data = -1, fsdp = 3, tensor = 1 does not make up the 1 "
            "devices that are here.",
        ),
        (
            "--evaluate=nowhere",
            "'nowhere' is neither a run's folder with checkpoints, one of its checkpoints/STEP, an inference folder, a "
            "file of weights, nor the name of shipped weights (digits, fashion_mnist): there is nothing of this name.",
        ),
        ("--config.model.num_heads=5", "5 heads do not divide the width 64."),
        (
            f"--config={ROOT}/configs/_imagenet.py",
            f"'{ROOT}/configs/_imagenet.py' is no configuration: it has no function get_config.",
        ),
        (
            f"--config={ROOT}/configs/digits.py:small",
            f"'{ROOT}/configs/digits.py' has no variants: leave out ':small'.",
        ),
        ("--config.seed=-1", "config.seed must be an integer from 0 to 4294967295, not -1."),
        (
            "--config.augment.randaugment=rand-m9-mstd0.5-inc1",
            "config.augment.randaugment needs images of 8 bits, but these have float pixels.",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_a_status(mistaken, tmp_path, argument, sentence):
    result = mistaken(tmp_path / "run", argument)
    assert result.stderr == f"main.py: {sentence}\n"
    assert result.stdout == ""
    assert result.returncode != 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "model", "workdir"),
    [
        ([], "deit_micro", "runs/digits"),  # as `make run` starts it
        (["--config=configs/deit.py:tiny,softmax"], "deit_tiny", "runs/deit-tiny-softmax"),
        (["--config", "deit:tiny"], "deit_tiny", "runs/deit-tiny"),
        (["--config=deit", "--workdir=x", "--config.model.name", "levit_128"], "levit_128", "x"),
    ],
)
def test_the_configuration_is_found_in_the_arguments(monkeypatch, arguments, model, workdir):
    class Begun(Exception):  # noqa: N818  no error
        pass

    def run(config, folder, *, profile, extend):
        raise Begun(config.model.name, str(folder))

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr(process, "start", lambda options: None)
    monkeypatch.setattr(process.distributed, "use_compilation_cache", lambda folder: None)
    with pytest.raises(Begun) as begun:
        process.train(train.make_parser().read(arguments), "main.py", None)
    assert begun.value.args == (model, workdir)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=digits", "--profile=1:2"], "takes the run's own configuration: leave out --profile and --config."),
        (
            ["--config.seed=7", "--config.dataset.name=digits"],
            "does not heed seed: of the configuration, only ",
        ),
        (["--noconfig.reset_head"], "does not heed reset_head: "),
    ],
)
def test_an_evaluation_refuses_what_it_would_ignore(mistaken, tmp_path, arguments, sentence):
    result = mistaken(tmp_path / "run", "--evaluate=nowhere", *arguments)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1 and result.returncode == 1


def test_all_mistakes_are_said_at_once(mistaken, tmp_path):
    fields = mistaken(tmp_path / "run", "--config.train.epoch=1", "--config.optimiser.b1=2", "--config=nothing")
    assert fields.stderr.count("\n") == 4
    for part in ("3 mistakes:", "'train.epoch': did you mean 'train.epochs'", "'optimiser.b1'", "'nothing'"):
        assert part in fields.stderr
    wrong = ("--config.train.epochs=many", "--config.mask.begin=x", "--config.train.batch_size=0", "--config.seed=-1")
    values = mistaken(tmp_path / "run", *wrong)
    assert values.stderr.count("\n") == 5
    for part in (
        "4 mistakes:",
        "config.seed must be",
        "'many'",
        "'x'",
        "config.train.batch_size must be an integer of at least 1, not 0.",
    ):
        assert part in values.stderr


def test_the_fields_are_listed_with_the_configurations_values(mistaken, tmp_path):
    listed = mistaken(tmp_path / "run", "--config=digits", "--config.mask.end=0.7", "--help-config")
    assert listed.returncode == 0
    assert listed.stdout.count("--config.") == len(FIELDS)
    assert "--config.model.name=deit_micro\n" in listed.stdout
    assert "--config.mask.end=0.7\n    Fraction of training" in listed.stdout


def test_a_bug_in_one_of_several_processes_ends_it(monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("a bug")

    statuses = []
    options = train.make_parser().read([])
    monkeypatch.setattr(process, "load_overridden", fail)
    monkeypatch.setattr(process.distributed.os, "_exit", statuses.append)
    with pytest.raises(ValueError, match="a bug"):  # alone, Python ends it
        process.train(options, "main.py", None)
    monkeypatch.setattr(process.distributed, "has_others", lambda: True)
    process.train(options, "main.py", None)
    assert statuses == [1]
    said = capsys.readouterr().err
    assert "ValueError: a bug" in said
    assert "main.py: ended by the error above; nothing was written." in said


@pytest.mark.parametrize(("error", "status"), [(InputError("no."), 1), (DeterministicError("no."), 3)])
def test_what_would_only_end_the_same_way_again_has_a_status_of_its_own(monkeypatch, capsys, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(process, "load_overridden", fail)
    with pytest.raises(SystemExit) as ended:
        process.train(train.make_parser().read([]), "main.py", None)
    assert ended.value.code == status
    assert capsys.readouterr().err == "main.py: no.\n"


def interrupt(workdir, *, lines, launcher=False, ignored=False, times=1, group=False):
    """Starts a run, sends SIGINT once metrics.jsonl has so many lines; its status, what it said, and its checkpoints.

    ignored: SIGINT was inherited so. group: the launcher's processes are told too, as by a terminal.
    """
    script = ["scripts/launch.py", "--simulate=2"] if launcher else ["main.py"]
    # A shell sets it, not a function in a fork of this process, whose threads could leave the fork waiting for a lock.
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if ignored else []
    output = workdir.parent / "said.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*shell, sys.executable, *(ROOT / script[0], *script[1:]), f"--workdir={workdir}", *SMALL, *FREQUENT],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        metrics = workdir / "metrics.jsonl"
        # From the first step's compilation on, the run listens to signals.
        while process.poll() is None and (
            "compiling the first step" not in output.read_text() or metrics.read_text().count("\n") < lines
        ):
            time.sleep(0.01)
        for _ in range(times):
            (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
            time.sleep(0.1)
        process.wait(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output.read_text(), checkpoint_steps(workdir / "checkpoints")


FREQUENT = ["--config.logging.every_steps=1", "--config.checkpoint.every_steps=1000", "--config.train.epochs=60"]


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupted_run_saves_and_says_where(tmp_path, ignored):
    status, said, (step,) = interrupt(tmp_path / "run", lines=3, ignored=ignored)
    assert status == 0, said
    assert "A second Ctrl-C ends it at once." in said
    assert f"Preempted; the state of step {step} is saved, and the same command goes on from there." in said
    status, said, steps = interrupt(tmp_path / "run", lines=step + 3)
    assert f"Going on from step {step} of" in said
    assert steps[-1] > step


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_even_where_python_cannot(tmp_path):
    # Both come while the first step is compiled.
    status, said, steps = interrupt(tmp_path / "run", lines=0, times=2)
    assert status == 130, said
    assert "main.py: interrupted twice, so it ended at once." in said
    assert steps == []


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_an_interrupted_launcher_has_all_processes_save_at_one_step(tmp_path, group):
    status, said, (step,) = interrupt(tmp_path / "run", lines=3, launcher=True, group=group)
    assert status == 0, said
    assert f"Preempted; the state of step {step} is saved, and the same command goes on from there." in said


@pytest.mark.slow
def test_a_launcher_that_is_interrupted_twice_leaves_no_process(tmp_path):
    status, said, _ = interrupt(tmp_path / "run", lines=3, launcher=True, times=2)
    assert status == 130, said
    assert "launch.py: interrupted twice, so the run was ended at once." in said


@pytest.mark.slow
def test_run_from_end_to_end(tmp_path):
    workdir = tmp_path / "run"
    first = run(workdir, *SMALL, "--profile=3:4")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert first.returncode == 0, first.stderr
    assert "held-out accuracy" in first.stdout
    assert ": loss " in first.stderr and "\r" not in first.stderr  # no terminal: lines, no bar
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["max_difference"] <= 1e-5
    for name in ("config.json", "metrics.jsonl", "checkpoints", "inference", "training.png", "tensorboard"):
        assert (workdir / name).exists()

    again = run(workdir, *SMALL)
    assert again.returncode == 0
    assert (
        "This run is finished. A larger --config.train.epochs with --extend trains it further; to start "
        in again.stdout
    )
    evaluated = run(workdir, f"--evaluate={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"inference form  {100 * summary['accuracy_inference_form']:.2f} %" in evaluated.stdout
    assert f"step {summary['steps']}, mask threshold 1\n  digits, split test: 360 images" in evaluated.stdout
    other = run(workdir, f"--evaluate={workdir}", "--config.dataset.eval_split=minival", "--config.mesh.data=1")
    assert "  digits, split minival: 288 images of 10 classes\n" in other.stdout
    for split in ("test", "minival"):
        assert (workdir / "evaluation" / f"digits-{split}-{summary['steps']}" / "confusion.png").exists()
    other = run(workdir, *SMALL, "--config.seed=1")
    assert other.returncode != 0
    assert "config.seed = 0, not 1" in other.stderr
    assert other.stderr.count("\n") == 1

    # Killed with no warning at two moments, and each time started again by the same command.
    killed = tmp_path / "killed"
    for lines in (1, 4):
        process = subprocess.Popen(
            command(killed, *SMALL, "--config.logging.every_steps=5"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = killed / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < lines):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "summary.json").exists()
    last = run(killed, *SMALL, "--config.logging.every_steps=5")
    assert last.returncode == 0, last.stderr
    assert "Going on from step" in last.stdout
    resumed = json.loads((killed / "summary.json").read_text())
    assert resumed["parameters_sha256"] == summary["parameters_sha256"]


@pytest.mark.slow
def test_one_run_at_a_time_in_a_workdir(tmp_path):
    workdir = tmp_path / "run"
    first = subprocess.Popen(
        command(workdir, *SMALL, "--config.train.epochs=500"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while first.poll() is None and not (workdir / "checkpoints" / "5").exists():
            time.sleep(0.05)
        second = run(workdir, *SMALL, "--config.train.epochs=500")
        assert second.returncode != 0
        assert second.stdout == ""
        assert re.fullmatch(
            rf"main.py: '{workdir}' is being written by process {first.pid} on \S+, which began at .* UTC: wait for "
            r"its end, or choose another --workdir.\n",
            second.stderr,
        )
        first.send_signal(signal.SIGINT)  # the first has gone on meanwhile
        said, _ = first.communicate(timeout=120)
        assert re.search(r"Preempted; the state of step \d+ is saved, and the same command goes on from there\.", said)
        assert (workdir / "checkpoints").is_dir()
        assert not (workdir / "lock").exists()
    finally:
        first.kill()
        first.wait()
