import os
import signal
import threading

import chex
import jax
import pytest

from castling_jax.convert.checkpoint import checkpoint_steps
from castling_jax.convert.inference_folder import load_inference
from castling_jax.training import loop
from castling_jax.training.preemption import Preempted, PreemptionWatch
from tests.training.test_loop import small_config, train


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


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_the_first_interrupt_is_heard_and_the_second_raises(inherited, capfd):
    before = signal.signal(signal.SIGINT, inherited)
    try:
        with PreemptionWatch(NoCheckpoints()) as watch:
            assert not watch.reached(1)
            os.kill(os.getpid(), signal.SIGINT)
            assert watch.reached(2)
            assert "A second Ctrl-C ends it at once." in capfd.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == inherited
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_of_several_processes_tells_the_others_of_an_interrupt(monkeypatch):
    """By JAX's service, which has SIGTERM's handler; its part is played here."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    try:
        with PreemptionWatch(NoCheckpoints()) as watch:
            os.kill(os.getpid(), signal.SIGINT)
            assert not watch.reached(1)  # all save where the service says
            assert heard == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)


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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_end_saves_and_goes_on_to_the_same_parameters(tmp_path, monkeypatch, number):
    config = small_config(train={"ema_decay": 0.99})  # warmed up by the step's number, which a checkpoint has
    expected = train(config, tmp_path / "alone")

    def interrupted(batches):
        interrupted.count += 1
        if interrupted.count == 6:
            os.kill(os.getpid(), number)
        return next(batches)

    interrupted.count = 0
    monkeypatch.setattr(loop, "next", interrupted, raising=False)
    with pytest.raises(Preempted) as told:
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert told.value.step == 6
    assert str(told.value) == "the state of step 6 is saved, and the same call goes on from there."
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1] == 6
    assert train(config, tmp_path / "run")["parameters_sha256"] == expected["parameters_sha256"]
    averaged = [load_inference(tmp_path / folder / "inference")[1] for folder in ("alone", "run")]
    chex.assert_trees_all_equal(*averaged)
