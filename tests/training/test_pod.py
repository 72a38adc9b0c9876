"""Real processes on this machine, trained, killed, and started again."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from castling_jax.bench.faults import LAUNCHER, SMALL, Pod
from castling_jax.convert.checkpoint import CHECKPOINTS, checkpoint_steps
from castling_jax.convert.run_folder import read_metrics

pytestmark = pytest.mark.slow
TOTAL = 4 * 22  # steps of SMALL


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of two processes that is left alone, and its summary."""
    pod = Pod(tmp_path_factory.mktemp("pod") / "alone", processes=2)
    assert pod.wait() == 0, pod.output()
    return pod.workdir, json.loads((pod.workdir / "summary.json").read_text())


def test_two_processes_write_one_run(alone):
    workdir, summary = alone
    assert summary["steps"] == TOTAL
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, TOTAL + 1))
    printed = workdir.with_suffix(".log").read_text()
    assert printed.count("held-out accuracy") == 1  # process 0 alone says what came of it


def test_a_run_killed_in_every_way_ends_with_the_same_parameters(alone, tmp_path):
    run = tmp_path / "run"
    pod = Pod(run, processes=2)
    assert pod.wait_until(lambda: pod.steps() >= 15)
    pod.kill_one(1)
    assert pod.wait() == 1
    assert "process 1 of 2 was killed by SIGKILL, so the run was ended" in pod.output()
    assert checkpoint_steps(run / CHECKPOINTS)[-1] >= 10

    pod = Pod(run, processes=2)
    assert pod.wait_until(lambda: pod.steps() >= 35)
    assert pod.wait_until(pod.is_saving)
    pod.kill()
    pod.wait()

    pod = Pod(run, processes=2)
    assert pod.wait_until(lambda: pod.steps() >= 55)
    pod.terminate()
    assert pod.wait() == 0
    (said,) = [line for line in pod.output().splitlines() if line.startswith("Preempted")]
    step = checkpoint_steps(run / CHECKPOINTS)[-1]
    assert said == f"Preempted; the state of step {step} is saved, and the same command goes on from there."
    assert 55 <= step < TOTAL

    pod = Pod(run, processes=2)
    assert pod.wait() == 0, pod.output()
    assert f"Going on from step {step} of {TOTAL}" in pod.output()
    assert pod.sha256() == alone[1]["parameters_sha256"]


def test_one_process_that_is_interrupted_has_all_save_at_one_step_and_process_0s_clock_does_too(tmp_path):
    run = tmp_path / "run"
    by_the_clock = ("--config.checkpoint.every_steps=1000", "--config.checkpoint.every_minutes=0.01")
    pod = Pod(run, processes=2, flags=(*SMALL, *by_the_clock))
    assert pod.wait_until(lambda: bool(checkpoint_steps(run / CHECKPOINTS)))
    pod.kill_one(1, signal.SIGINT)
    assert pod.wait() == 0, pod.output()
    step = checkpoint_steps(run / CHECKPOINTS)[-1]
    assert f"Preempted; the state of step {step} is saved, and the same command goes on from there." in pod.output()


def test_a_loss_that_is_not_finite_is_said_by_all_and_has_a_status_of_its_own(tmp_path):
    flags = (*SMALL, "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_epochs=0")
    pod = Pod(tmp_path / "run", processes=2, flags=flags)
    assert pod.wait() == 3
    assert "[process 0] main.py: the loss is nan at step 2: there is no checkpoint yet" in pod.output()
    assert "goes on from" not in pod.output()


def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    run = tmp_path / "run"
    pod = Pod(run, processes=4)
    assert pod.wait_until(lambda: pod.steps() >= 12)
    pod.terminate()
    assert pod.wait() == 0, pod.output()
    step = checkpoint_steps(run / CHECKPOINTS)[-1]

    # Two processes of two devices each, which split the matrices as well.
    pod = Pod(run, processes=2, devices=2, flags=(*SMALL, "--config.mesh.fsdp=2"))
    assert pod.wait() == 0, pod.output()
    expected, found = ([line["loss"] for line in read_metrics(folder)] for folder in (alone[0], run))
    # Other orders of float32 sums, 6e-8 each, that training enlarges from step to step: by the tenth step behind the
    # restart, at most to a thousandth.
    np.testing.assert_allclose(found[: step + 10], expected[: step + 10], rtol=1e-3)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(alone[1]["eval_loss"], rel=0.1)
    assert summary["accuracy_inference_form"] == pytest.approx(alone[1]["accuracy_inference_form"], abs=0.02)


def test_without_a_launcher_the_survivors_end_by_themselves(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    main = str(LAUNCHER.parents[1] / "main.py")
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, main, f"--workdir={tmp_path / 'run'}", *SMALL, f"--coordinator=localhost:{port}"),
                *("--num_processes=2", f"--process_id={index}"),
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for index in range(2)
    ]
    try:
        while not read_metrics(tmp_path / "run"):
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        _, said = processes[0].communicate(timeout=300)
        assert processes[0].returncode != 0
        # Ours, where a collective breaks off, or JAX's, whose coordination service misses the other's heartbeat.
        assert "the processes' common work broke off" in said or "JAX distributed service detected fatal errors" in said
    finally:
        for process in processes:
            process.kill()
            process.wait()
