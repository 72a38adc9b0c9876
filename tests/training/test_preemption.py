import os
import signal
import threading

import pytest

from castling_jax.training import loop
from castling_jax.training.checkpoints import checkpoint_steps
from castling_jax.training.preemption import Preempted, PreemptionWatch
from tests.training.test_loop import small_config


class NoCheckpoints:
    def reached_preemption(self, step):
        return False


def test_sigterm_is_heard_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionWatch(NoCheckpoints()) as watch:
        assert not watch.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.reached(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_has_no_handlers():
    found = []

    def run():
        with PreemptionWatch(NoCheckpoints()) as watch:
            found.append(watch.reached(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.slow
def test_a_run_told_to_end_saves_and_goes_on_to_the_same_parameters(tmp_path, monkeypatch):
    expected = loop.train(small_config(), tmp_path / "alone")

    def interrupted(batches):
        interrupted.count += 1
        if interrupted.count == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(batches)

    interrupted.count = 0
    monkeypatch.setattr(loop, "next", interrupted, raising=False)
    with pytest.raises(Preempted) as told:
        loop.train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert told.value.step == 6
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1] == 6
    assert loop.train(small_config(), tmp_path / "run")["parameters_sha256"] == expected["parameters_sha256"]
