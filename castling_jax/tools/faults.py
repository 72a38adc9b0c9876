"""Kills a run again and again, and sees whether it ends as one that was left alone.

    python -m castling_jax.tools.faults [--kills=20] [--processes=2] [--seed=0] [--out=FILE.md]

trains a small model on the digits in several processes on this machine, once undisturbed and once killed at random
moments: one process by SIGKILL, all by SIGKILL (half of the time while a checkpoint is being written), or all told to
end by SIGTERM; and each time goes on by the same command. Both must end with the same parameters, bit for bit. It works
in a clone of the repository, whose scripts/launch.py it starts.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from castling_jax.ops.errors import InputError
from castling_jax.training.checkpoints import CHECKPOINTS
from castling_jax.training.metrics import read_metrics

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
        self.workdir, self._count = workdir, processes
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
        """Whether a checkpoint is being written."""
        return any((self.workdir / CHECKPOINTS).glob("*tmp*"))

    def kill_one(self, index: int) -> None:
        """SIGKILL of one process."""
        children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if f"--process_id={index}".encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    os.kill(child, signal.SIGKILL)

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
        summary = self.workdir / "summary.json"
        if not summary.exists():
            raise InputError(f"the run in '{self.workdir}' did not reach its end; its last words: {self.said()[-500:]}")
        return json.loads(summary.read_text())["parameters_sha256"]


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was done to a run, and when: at which step, how long before the launcher had ended, with which status."""

    kind: str
    step: int
    seconds: float
    status: int


def kill_somehow(pod: Pod, draw: random.Random, processes: int, until_step: int) -> Kill | None:
    """Lets the run get somewhere and kills it in one of four ways; None if it ended before.

    Args:
      pod: a run just started.
      draw: of the moment and of the way.
      processes: of the pod.
      until_step: a step that it will reach.
    """
    kind = draw.choice(("one", "all", "all, while saving", "SIGTERM"))
    # From the very start, when the processes are still finding each other, to some steps on.
    pause, step = draw.uniform(0, 15), draw.randrange(until_step)
    since = time.monotonic()
    if not pod.wait_until(lambda: time.monotonic() - since > pause or pod.steps() > step):
        return None
    if kind == "all, while saving" and not pod.wait_until(pod.is_saving):
        return None
    at, since = pod.steps(), time.monotonic()
    if kind == "one":
        pod.kill_one(draw.randrange(processes))
    elif kind == "SIGTERM":
        pod.terminate()
    else:
        pod.kill()
    status = pod.wait()
    return Kill(kind, at, time.monotonic() - since, status)


def sweep(folder: Path, *, kills: int, processes: int, seed: int) -> tuple[list[Kill], str, str]:
    """Both runs; returns the kills, and the parameters' SHA-256 of the run left alone and of the other."""
    alone = Pod(folder / "alone", processes=processes)
    print("A run that is left alone ...", flush=True)
    alone.wait()
    expected, total = alone.sha256(), alone.steps()
    draw = random.Random(seed)
    done: list[Kill] = []
    with tqdm(total=kills, unit="kill") as bar:
        while len(done) < kills:
            pod = Pod(folder / "killed", processes=processes)
            kill = kill_somehow(pod, draw, processes, total)
            if kill is not None:
                done.append(kill)
                bar.update()
            else:  # it got to its end first: begin anew, after a look at it
                pod.wait()
                if pod.sha256() != expected:
                    return done, expected, pod.sha256()
                shutil.rmtree(folder / "killed")
    last = Pod(folder / "killed", processes=processes)
    last.wait()
    return done, expected, last.sha256()


def describe(kills: list[Kill], processes: int, expected: str, found: str) -> str:
    """A page in Markdown."""
    rows = [
        f"| {n} | {kill.kind} | {kill.step} | {kill.seconds:.1f} | {kill.status} |" for n, kill in enumerate(kills, 1)
    ]
    same = "the same, bit for bit," if expected == found else "NOT the same"
    return "\n".join(
        [
            f"{len(kills)} kills of a run of {processes} processes. Its parameters are **{same}** as those of a run",
            f"left alone: `{found}` and `{expected}`.",
            "",
            "| | killed | at step | seconds until all had ended | launcher's status |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ways (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table there")
    options = parser.parse_args()
    if not LAUNCHER.exists():
        sys.exit(f"there is no '{LAUNCHER}': run this in a clone of the repository.")
    with tempfile.TemporaryDirectory(prefix="castling_jax_faults_") as folder:
        try:
            kills, expected, found = sweep(
                Path(folder), kills=options.kills, processes=options.processes, seed=options.seed
            )
        except InputError as error:
            sys.exit(str(error))
    page = describe(kills, options.processes, expected, found)
    print(page)
    if options.out is not None:
        options.out.write_text(page)
    sys.exit(expected != found)


if __name__ == "__main__":
    main()
