"""Runs that are killed and resumed, beside runs that are left alone."""

import os
import signal

import pytest

from castling_jax.training import loop
from castling_jax.training.preemption import Preempted
from tests.training.test_loop import train, without_times


def check_resumed(config, folder, monkeypatch, *, after):
    """Asserts that a run that is killed after some steps and resumed is the run that was not; returns its figures."""
    expected = train(config, folder / "alone")

    def interrupted(batches):
        interrupted.count += 1
        if interrupted.count == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(batches)

    interrupted.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "next", interrupted, raising=False)
        with pytest.raises(Preempted) as told:
            train(config, folder / "run")
    assert told.value.step == after
    resumed = train(config, folder / "run")
    assert resumed["parameters_sha256"] == expected["parameters_sha256"]
    assert {**resumed, "train_seconds": 0} == {**expected, "train_seconds": 0}
    assert without_times(folder / "run") == without_times(folder / "alone")
    return resumed
