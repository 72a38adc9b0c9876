"""Kills a run again and again, and compares its parameters at the end with those of a run that was left alone."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.convert.run_folder import read_metrics
from castling_jax.errors import InputError
from castling_jax.tables import markdown
from castling_jax.training.summary import SUMMARY_FILE

LAUNCHER = Path(__file__).resolve().parents[2] / "scripts" / "launch.py"
SMALL = (
    "--config.model.depth=1",
    "--config.model.embed_dim=32",
    "--config.train.epochs=4",
    "--config.optimizer.warmup_epochs=1",
    "--config.checkpoint.every_steps=10",
    "--config.evaluation.every_epochs=3",
    "--config.logging.every_steps=1",
    "--config.logging.progress=False",
    "--config.logging.tensorboard=False",
)
LONGER = (*SMALL, "--config.train.epochs=24")  # long enough to be killed several times
LATEST_SECONDS = 40  # a kill comes at most so many seconds after a start
POLL_SECONDS = 0.005
TIMEOUT_SECONDS = 600  # for one start of the run


class Pod:
    """A run in several processes, in a session of their own so that all can be killed at once.

    Args:
      workdir: the run's folder.
      processes: how many processes.
      devices: devices of each process.
      flags: flags of main.py.
    """

    def __init__(self, workdir: Path, *, processes: int, devices: int = 1, flags: tuple[str, ...] = SMALL):
        self.workdir = workdir
        self._started = time.time()
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self._log = workdir.with_suffix(".log")
        with self._log.open("ab") as log:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, str(LAUNCHER), f"--simulate={processes}", f"--devices={devices}"),
                    *(f"--workdir={workdir}", *flags),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Waits until all processes have ended; returns the launcher's status."""
        try:
            return self._launcher.wait(TIMEOUT_SECONDS)
        finally:
            self.kill()  # does nothing unless the run hangs

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the run ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._launcher.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def steps(self) -> int:
        """The last step in the run's metrics; 0 before there are any."""
        lines = read_metrics(self.workdir)
        return lines[-1]["step"] if lines else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        unfinished = (self.workdir / CHECKPOINTS).glob("*tmp*")
        # An earlier kill leaves an unfinished one behind, which is older than this start.
        with contextlib.suppress(FileNotFoundError):  # the checkpoint was finished meanwhile
            return any(path.stat().st_mtime > self._started for path in unfinished)
        return True

    def kill_one(self, index: int, number: int = signal.SIGKILL) -> bool:
        """Sends a signal to one process; returns whether the process was there."""
        children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if f"--process_id={index}".encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    os.kill(child, number)
                    return True
        return False

    def kill(self) -> None:
        """Sends SIGKILL to all processes, the launcher too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM to the launcher, as a cluster does."""
        self._launcher.send_signal(signal.SIGTERM)

    def output(self) -> str:
        """The output of all starts in this run's folder so far."""
        return self._log.read_text(errors="replace")

    def sha256(self) -> str:
        """The SHA-256 of the parameters at the run's end.

        Raises:
          InputError: the run did not reach its end.
        """
        summary = self.workdir / SUMMARY_FILE
        if not summary.exists():
            last_words = " ".join(self.output().split())[-500:]
            raise InputError(f"the run in '{self.workdir}' did not reach its end, and said: {last_words}")
        return json.loads(summary.read_text())["parameters_sha256"]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill of a run.

    Attributes:
      kind: which processes got which signal.
      moment: seconds from the run's start to the kill.
      step: the last step in the run's metrics.
      seconds: seconds from the kill until all processes had ended.
      status: the launcher's status.
    """

    kind: str
    moment: float
    step: int
    seconds: float
    status: int


def kill_somehow(pod: Pod, draw: random.Random, processes: int) -> Kill | None:
    """Waits for a random moment and kills the run in one of four ways; None if the run ended before.

    Args:
      pod: a run that has just started.
      draw: draws the moment and the way.
      processes: how many processes the pod has.
    """
    kind = draw.choice(("one", "all", "all, while saving", "SIGTERM"))
    # From the very start, when the processes are still finding each other, to well into the training.
    pause, index = draw.uniform(0, LATEST_SECONDS), draw.randrange(processes)
    start = time.monotonic()
    if not pod.wait_until(lambda: time.monotonic() - start > pause):
        return None
    if kind == "all, while saving" and not pod.wait_until(pod.is_saving):
        return None
    step, since = pod.steps(), time.monotonic()
    if kind == "one":
        if not pod.kill_one(index):
            return None
    elif kind == "SIGTERM":
        pod.terminate()
    else:
        pod.kill()
    status = pod.wait()
    return Kill(kind, since - start, step, time.monotonic() - since, status)


def sweep(folder: Path, *, kills: int, processes: int, seed: int) -> tuple[list[Kill], str, set[str]]:
    """Kills runs so many times in all.

    Returns:
      The kills; the SHA-256 of the parameters of a run that was left alone; and those of the runs that were killed and
      went on to their ends.
    """
    alone = Pod(folder / "alone", processes=processes, flags=LONGER)
    print("A run that is left alone ...", flush=True)
    alone.wait()
    expected, draw = alone.sha256(), random.Random(seed)
    done: list[Kill] = []
    hashes: set[str] = set()
    with tqdm(total=kills, unit="kill") as bar:
        while len(done) < kills:
            pod = Pod(folder / "killed", processes=processes, flags=LONGER)
            kill = kill_somehow(pod, draw, processes)
            if kill is not None:
                done.append(kill)
                bar.update()
            pod.wait()
            # A run that got to its end between two kills is begun anew.
            if (folder / "killed" / SUMMARY_FILE).exists():
                hashes.add(pod.sha256())
                shutil.rmtree(folder / "killed")
    last = Pod(folder / "killed", processes=processes, flags=LONGER)
    last.wait()
    return done, expected, hashes | {last.sha256()}


def describe(kills: list[Kill], processes: int, expected: str, hashes: set[str]) -> str:
    """A page in Markdown: the verdict, and a table of the kills. `expected` and `hashes` are `sweep`'s."""
    header = ("", "killed", "seconds after its start", "at step", "seconds until all had ended", "launcher's status")
    rows = [
        (f"{n}", kill.kind, f"{kill.moment:.1f}", f"{kill.step}", f"{kill.seconds:.1f}", f"{kill.status}")
        for n, kill in enumerate(kills, 1)
    ]
    same = "the same, bit for bit," if hashes == {expected} else "NOT the same"
    return "\n".join(
        [
            f"The run of {processes} processes on one machine was killed {len(kills)} times, and the same command",
            f"resumed it each time. Its parameters at the end are **{same}** as those of an uninterrupted run: SHA-256",
            f"`{'`, `'.join(sorted(hashes))}` and `{expected}`.",
            "",
            *markdown(header, rows, "llr"),
            "",
        ]
    )
