"""Who may write in a run's folder: on a disk and in a bucket."""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from castling_jax.training import lock
from castling_jax.training.lock import Lock, one_writer
from castling_jax.training.lock_file import lock_file
from tests.training import fake_gcs

needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: pip install gcsfs"
)


@pytest.fixture(params=["disk", pytest.param("bucket", marks=needs_gcsfs)])
def workdir(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield epath.Path(tmp_path)
        return
    with fake_gcs.serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield epath.Path("gs://bucket/run")


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("SILENCE", 1), ("GRACE", 0.2), ("POLL", 0.05)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


def content(workdir):
    return json.loads(lock_file(workdir / "lock").read())


def leave(workdir, **changes):
    """A lock of a process that is not there any more, such as a SIGKILL leaves."""
    held = Lock(workdir)
    held._ends.set()
    held._thread.join()
    changed = dataclasses.replace(held._own, **{"token": "another", "started": "1"} | changes)
    held._own = changed
    file = lock_file(workdir / "lock")
    file.take_over(file.read(), held._content())
    return held


def test_it_says_who_writes_and_is_gone_afterwards(workdir):
    with one_writer(workdir) as check:
        check()
        assert content(workdir).items() >= {"process": os.getpid(), "processes": 1}.items()
    assert lock_file(workdir / "lock").read() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_it_is_gone_however_the_run_ends(workdir, error):
    with pytest.raises(error), one_writer(workdir):
        raise error
    assert lock_file(workdir / "lock").read() is None


def test_a_second_run_is_refused_and_the_first_goes_on(workdir, refuses):
    with one_writer(workdir) as check:
        with refuses(f"'{workdir}' is being written by process {os.getpid()} on ", "or choose another --workdir."):
            Lock(workdir)
        check()


def test_what_a_killed_process_of_this_machine_leaves_is_taken_over_at_once(workdir, monkeypatch, capsys):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 3600)
    monkeypatch.setattr(lock, "GRACE_SECONDS", 3600)
    leave(workdir)  # of this very process's number, which began at another time
    with one_writer(workdir):
        assert content(workdir)["token"] != "another"
    said = capsys.readouterr().out
    assert said.startswith(f"Took over '{workdir}' from process {os.getpid()} on ")
    assert said.endswith(" UTC and is gone.\n")


def test_another_machines_is_taken_over_after_its_silence(workdir, capsys):
    leave(workdir, machine="another", host="elsewhere")
    with one_writer(workdir):
        pass
    waited, took = capsys.readouterr().out.splitlines()
    assert waited.endswith("; waiting up to 1 s for a sign of it.")
    assert f"from process {os.getpid()} on elsewhere" in took
    assert took.endswith(" and is silent.")


def test_another_machines_that_lives_is_not_taken_over(workdir, refuses, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 3600)
    held = leave(workdir, machine="another", host="elsewhere")
    times = itertools.count()
    monkeypatch.setattr(lock, "_now", lambda: f"2000-01-01 00:00:{next(times) % 60:02} UTC")
    held._ends.clear()
    beats = threading.Thread(target=held._beat, daemon=True)
    beats.start()
    with refuses(f"is being written by process {os.getpid()} on elsewhere"):
        Lock(workdir)
    held._ends.set()
    beats.join()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"\xff", b'{"host": "h"}'])
def test_a_damaged_one_is_as_another_machines(workdir, capsys, damaged):
    lock_file(workdir / "lock").create(damaged)
    with one_writer(workdir):
        pass
    assert "by a process that does not say who it is; waiting" in capsys.readouterr().out


def test_of_several_that_take_over_one_succeeds(workdir):
    file = lock_file(workdir / "lock")
    file.create(b"stale")
    start, won = threading.Barrier(8), []

    def contend(name):
        mine = lock_file(workdir / "lock")
        found = mine.read()
        start.wait()
        if mine.take_over(found, name):
            won.append(name)

    names = [f"{number}".encode() for number in range(8)]
    threads = [threading.Thread(target=contend, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert file.read() == won[0]


def test_of_several_that_start_one_succeeds(workdir):
    won = [lock_file(workdir / "lock").create(f"{number}".encode()) for number in range(3)]
    assert won == [True, False, False]


def test_a_run_that_lost_its_lock_ends_and_leaves_the_others(workdir, refuses):
    with pytest.raises(lock.InputError), one_writer(workdir) as check:
        file = lock_file(workdir / "lock")
        other = content(workdir) | {"host": "elsewhere", "token": "another"}
        assert file.take_over(file.read(), json.dumps(other).encode())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            check()
            time.sleep(0.05)
    assert content(workdir)["token"] == "another"


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_a_run_whose_lock_a_person_spoils_writes_it_again(workdir, how):
    with one_writer(workdir) as check:
        file = lock_file(workdir / "lock")
        before = file.read()
        if how == "removed":
            file.remove(before)
        else:
            file.take_over(before, b"spoilt")
        deadline = time.monotonic() + 60
        while file.read() in (None, b"", b"spoilt") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert content(workdir)["process"] == os.getpid()
        check()
    assert file.read() is None


def test_a_folder_that_cannot_be_made(tmp_path, refuses):
    (tmp_path / "file").write_text("")
    with (
        refuses(f"'{tmp_path / 'file' / 'run'}' cannot be written to (", "Not a directory"),
        one_writer(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


def test_a_process_that_is_dead_though_nobody_asked_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        started = lock._started(process.pid)
        assert started
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while lock._started(process.pid) == started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock._started(process.pid) is None
    finally:
        process.kill()
        process.wait()
