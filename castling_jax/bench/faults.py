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
from castling_jax.training.summary import SUMMARY_FILE

LAUNCHER = Path(__file__).resolve().parents[2] / "scripts" / "launch.py"
SMALL = (
    "--config.model.depth=1",
    "--config.model.embed_dim=32",
    "--config.train.epochs=6",
    "--config.optimizer.warmup_epochs=1",
    "--config.checkpoint.every_steps=10",
    "--config.evaluation.every_epochs=4",
    "--config.logging.every_steps=1",
    "--config.logging.progress=False",
    "--config.logging.tensorboard=False",
)
LONGER = (*SMALL, "--config.train.epochs=24")  # so that there is something to kill
LATEST_SECONDS = 40  # after a start, that it is killed
POLL_SECONDS = 0.005
TIMEOUT_SECONDS = 600  # of one start


class Pod:
    """A run in several processes, each in a session of its own, so that all can be killed at once.

    Args:
      workdir: the run's.
      processes: how many.
      devices: of each.
      flags: main.py's.
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
        """The launcher's status, once all have ended."""
        try:
            return self._launcher.wait(TIMEOUT_SECONDS)
        finally:
            self.kill()  # does nothing unless it hangs

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the run ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._launcher.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def steps(self) -> int:
        """How far the run has got, as its metrics tell."""
        lines = read_metrics(self.workdir)
        return lines[-1]["step"] if lines else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, not what an earlier kill left."""
        unfinished = (self.workdir / CHECKPOINTS).glob("*tmp*")
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            return any(path.stat().st_mtime > self._started for path in unfinished)
        return True

    def kill_one(self, index: int, number: int = signal.SIGKILL) -> bool:
        """Sends one process a signal; whether it was there."""
        children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if f"--process_id={index}".encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    os.kill(child, number)
                    return True
        return False

    def kill(self) -> None:
        """SIGKILL of all, the launcher too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM, as a cluster sends it."""
        self._launcher.send_signal(signal.SIGTERM)

    def said(self) -> str:
        """All that was printed in this run's folder so far."""
        return self._log.read_text(errors="replace")

    def sha256(self) -> str:
        """Of the parameters at the end.

        Raises:
          InputError: the run has not ended well.
        """
        summary = self.workdir / SUMMARY_FILE
        if not summary.exists():
            raise InputError(
                f"the run in '{self.workdir}' did not reach its end, and said: {' '.join(self.said().split())[-500:]}"
            )
        return json.loads(summary.read_text())["parameters_sha256"]


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was done to a run.

    Attributes:
      kind: the way.
      moment: seconds from its start.
      step: the last that its metrics tell of.
      seconds: from the kill until all had ended.
      status: the launcher's.
    """

    kind: str
    moment: float
    step: int
    seconds: float
    status: int


def kill_somehow(pod: Pod, draw: random.Random, processes: int) -> Kill | None:
    """Lets the run get somewhere and kills it in one of four ways; None if it ended before.

    Args:
      pod: a run just started.
      draw: of the moment and of the way.
      processes: of the pod.
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
    """The kills, the parameters' SHA-256 of a run left alone, and those of the runs that were killed, to their ends.

    A run that gets to its end between two kills is begun anew.
    """
    alone = Pod(folder / "alone", processes=processes, flags=LONGER)
    print("A run that is left alone ...", flush=True)
    alone.wait()
    expected, draw = alone.sha256(), random.Random(seed)
    done: list[Kill] = []
    found: set[str] = set()
    with tqdm(total=kills, unit="kill") as bar:
        while len(done) < kills:
            pod = Pod(folder / "killed", processes=processes, flags=LONGER)
            kill = kill_somehow(pod, draw, processes)
            if kill is not None:
                done.append(kill)
                bar.update()
            pod.wait()
            if (folder / "killed" / SUMMARY_FILE).exists():
                found.add(pod.sha256())
                shutil.rmtree(folder / "killed")
    last = Pod(folder / "killed", processes=processes, flags=LONGER)
    last.wait()
    return done, expected, found | {last.sha256()}


def describe(kills: list[Kill], processes: int, expected: str, found: set[str]) -> str:
    """A page in Markdown."""
    rows = [
        f"| {n} | {kill.kind} | {kill.moment:.1f} | {kill.step} | {kill.seconds:.1f} | {kill.status} |"
        for n, kill in enumerate(kills, 1)
    ]
    same = "the same, bit for bit," if found == {expected} else "NOT the same"
    return "\n".join(
        [
            f"The run of {processes} processes on one machine was killed {len(kills)} times, and the same command",
            f"resumed it each time. Its parameters at the end are **{same}** as those of an uninterrupted run: SHA-256",
            f"`{'`, `'.join(sorted(found))}` and `{expected}`.",
            "",
            "| | killed | seconds after the start | at step | seconds until all had ended | launcher's status |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
