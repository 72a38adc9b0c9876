"""Runs studies, or the rest of them: python -m experiments.run STUDY... [--jobs=2] [--only=PATTERN].

Each job is a process on its own core, with one thread and the lowest priority. A run that has its result in
experiments/results is finished and left alone; a run that was killed resumes from its last checkpoint.

All runs of a study use the code of one commit, the HEAD at the study's first start, in a git worktree of that commit,
so the checkout may change meanwhile. To run a study anew, remove its folders in experiments/results and in
runs/experiments.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import fnmatch
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from castling_jax.data.sources import path_of
from castling_jax.errors import InputError, check_at_least, refusing
from castling_jax.storage import write_atomically
from castling_jax.tools.cli import ending_in_a_sentence
from experiments.results import ORIGIN_FILE, read_origin
from experiments.study import RESULTS, ROOT, Trial, code_hash, load_study, study_hash, trials_of

RUNS = ROOT / "runs" / "experiments"  # ignored by git
DATA = "data_local"  # ignored by git, so a new worktree lacks it
CODE = "code"  # in RUNS/STUDY: the worktree
POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run that waits, the folder of its study's code, and the study's lock."""

    trial: Trial
    code: Path
    lock: int


def run(names: Sequence[str], *, jobs: int, only: str = "*") -> int:
    """Runs the unfinished runs of studies, one study after another; returns the number of runs that failed.

    Raises:
      InputError: a study is unknown, is being run already, has changed since its first result, or lacks its data; or no
        study has a run called `only`.
    """
    check_at_least("--jobs", jobs, 1)
    asked = {
        name: [trial for trial in trials_of(name, load_study(name)) if fnmatch.fnmatch(trial.name, only)]
        for name in names
    }
    if not any(asked.values()):
        raise InputError(f"{' and '.join(asked)}: no run is called {only!r}.")
    waiting: collections.deque[_Job] = collections.deque()
    with contextlib.ExitStack() as locks:
        for name, trials in asked.items():
            if not trials:
                continue  # the study is not started, so its commit is not recorded
            lock = locks.enter_context(_one_runner(name))
            unfinished = [trial for trial in trials if not trial.result.exists()]
            if unfinished:
                _check_data(name)
            origin = origin_of(name)
            print(f"{name}: {len(trials) - len(unfinished)} of {len(trials)} runs are finished.", flush=True)
            if unfinished:
                code = code_of(name, origin)
                waiting += [_Job(trial, code, lock) for trial in unfinished]
        return _run_all(waiting, jobs)


def _check_data(name: str) -> None:
    """Raises an InputError if a study's data is missing: each of its runs would say so, one after another."""
    path = path_of(load_study(name).config().dataset.name)
    if path is not None and not (ROOT / path).exists():
        raise InputError(f"{name} reads '{path}', which is missing: experiments/README.md says how to make it.")


@contextlib.contextmanager
def _one_runner(name: str) -> Iterator[int]:
    """Holds a study's lock, and yields its file descriptor.

    Every run's process inherits the descriptor, and with it the lock: if only the runner was killed, the next runner
    must wait for the runs that are still training.
    """
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    with (RUNS / name / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{name} is being run by another process: wait for its end, or end it.") from None
        yield file.fileno()


def origin_of(name: str) -> dict[str, str]:
    """The commit that a study's results come from, with the hashes of code and study; recorded at the first start.

    Raises:
      InputError: at the first start, there are uncommitted changes, or results or runs of an unknown origin; later,
        the study's file has changed.
    """
    if (recorded := read_origin(name)) is not None:
        return recorded
    changes = _git("status", "--porcelain", "castling_jax", "experiments", f":!{RESULTS.relative_to(ROOT)}")
    if changes:
        raise InputError(f"commit the code before {name} is first run with it ({' '.join(changes.split())}).")
    # Runs of an earlier start would go on, or end at once, and count as this commit's.
    if any(path.name != CODE for path in (RUNS / name).glob("*/")):
        raise InputError(f"'{RUNS / name}' holds runs of an earlier start of {name}: remove it first.")
    origin = {"commit": _git("rev-parse", "HEAD"), "code": code_hash(name), "study": study_hash(name)}
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ORIGIN_FILE, json.dumps(origin, indent=1).encode() + b"\n")
    return origin


def code_of(name: str, origin: dict[str, str]) -> Path:
    """The folder of the code that a study's results come from: a git worktree of its commit, in the folder of its runs.

    A copy of a checkout without .git, as on a borrowed machine, is that folder itself.

    Raises:
      InputError: the commit is not in this repository, or the code is not the recorded code.
    """
    has_git = (ROOT / ".git").exists()
    folder = RUNS / name / CODE if has_git else ROOT
    if has_git and not _is_checkout(folder, origin["commit"]):
        if folder.exists():
            shutil.rmtree(folder)
        _git("worktree", "prune")
        # Forced twice, because a kill leaves git's entry of the worktree locked.
        _git("worktree", "add", "--force", "--force", "--detach", str(folder), origin["commit"])
    if has_git and not (folder / DATA).is_symlink():
        (folder / DATA).symlink_to(ROOT / DATA)
    if code_hash(name, folder) != origin["code"]:
        raise InputError(
            f"'{folder}' is not the code of commit {origin['commit']} that '{RESULTS / name / ORIGIN_FILE}' records."
        )
    return folder


def _is_checkout(folder: Path, commit: str) -> bool:
    """Whether the folder is a worktree of the commit, whole and unchanged."""
    if not (folder / ".git").exists():
        return False
    try:
        is_clean = not _git("-C", str(folder), "status", "--porcelain", "castling_jax", "experiments")
        return is_clean and _git("-C", str(folder), "rev-parse", "HEAD") == commit
    except InputError:  # git does not know the worktree any more
        return False


def _git(*arguments: str) -> str:
    with refusing(FileNotFoundError, "experiments.run needs git"):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"git {' '.join(arguments)} failed ({' '.join(done.stderr.split())}).")
    return done.stdout.strip()


def _run_all(waiting: collections.deque[_Job], jobs: int) -> int:
    """Runs all that waits, `jobs` at a time; returns the number that failed."""
    # With more jobs than cores, several jobs share one.
    cores = list(itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), jobs))
    running: list[tuple[Trial, int, subprocess.Popen[bytes]]] = []
    failed = 0
    try:
        while waiting or running:
            while waiting and cores:
                job, core = waiting.popleft(), cores.pop()
                print(f"{job.trial.study}/{job.trial.name}: started on core {core}.", flush=True)
                running.append((job.trial, core, _start(job, core)))
            time.sleep(POLL_SECONDS)
            for trial, core, process in [one for one in running if one[2].poll() is not None]:
                running.remove((trial, core, process))
                cores.append(core)
                failed += not _has_finished(trial)
    finally:  # SIGTERM makes a run save its state and end
        for _, _, process in running:
            process.terminate()
        for _, _, process in running:
            process.wait()
    return failed


def _start(job: _Job, core: int) -> subprocess.Popen[bytes]:
    """Starts one run on one core."""
    trial = job.trial
    folder = RUNS / trial.study / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["nice", "-n19", "taskset", "--cpu-list", str(core), sys.executable, "-m", "experiments.train_one"]
    command += [trial.study, trial.name, f"--workdir={folder}", f"--result={trial.result}"]
    # One thread each: threads of several runs on the same cores would slow each other down.
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(job.code), os.environ.get("PYTHONPATH"))))
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    with _log_file(trial).open("a") as log:
        return subprocess.Popen(
            command, cwd=job.code, env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=[job.lock]
        )


def _has_finished(trial: Trial) -> bool:
    """Whether a run whose process has ended has left its result; prints the accuracy or the failure."""
    if not trial.result.exists():
        lines = _log_file(trial).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        print(f"{trial.study}/{trial.name}: failed; '{_log_file(trial)}' ends with: {last}", flush=True)
        return False
    result = json.loads(trial.result.read_text())
    accuracy = f"{100 * result['accuracy_inference_form']:.2f} %"
    split, minutes = result["data"]["test_split"], result["seconds"] / 60  # a study may read validation images alone
    print(f"{trial.study}/{trial.name}: {accuracy} on '{split}', trained in {minutes:.0f} min.", flush=True)
    return True


def _log_file(trial: Trial) -> Path:
    return RUNS / trial.study / trial.name / "log.txt"


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", help="a file in experiments/studies, without .py")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a core (default: %(default)s)")
    parser.add_argument("--only", default="*", help="a pattern of runs' names, such as 'castling-*-seed0'")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = run(options.study, jobs=options.jobs, only=options.only)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes the study.")
    sys.exit(f"{failed} failed." if failed else 0)


if __name__ == "__main__":
    main()
