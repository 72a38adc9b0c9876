"""One writer at a time in a run's folder.

WORKDIR/lock names the writer: its host, its process, and when it started. A living run rewrites the file every
BEAT_SECONDS, and removes it when it ends in any way but a SIGKILL or the loss of its machine. A lock that is left
behind is taken over: at once if its process ran on this machine and has ended, otherwise if the file does not change
for SILENCE_SECONDS. The waiting process measures that time itself, so the clocks of two machines are never compared.

If several processes try at once, one succeeds (lock_file.py). A process that slept so long that it lost its lock
notices the loss at its next beat.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from castling_jax.errors import InputError, reason
from castling_jax.training.distributed import said_by_process_0
from castling_jax.training.lock_file import lock_file

LOCK_FILE = "lock"
BEAT_SECONDS = 15
SILENCE_SECONDS = 60
GRACE_SECONDS = 5  # a process that was just killed may take so long to disappear
POLL_SECONDS = 1


@contextlib.contextmanager
def one_writer(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """Creates a run's folder, and holds its lock for the length of the block. All processes make the call.

    Yields:
      A function that raises an InputError, on process 0, once another run has taken over the lock.

    Raises:
      InputError: another run holds the lock, or the folder cannot be written to; on all processes.
    """
    lock, refusal = None, ""
    try:
        # Process 0 does not raise here: the others wait for its sentence, the empty one if it has the lock.
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                lock = Lock(workdir)
            except InputError as error:
                refusal = str(error)
            except OSError as error:
                refusal = f"'{workdir}' cannot be written to ({reason(error)})."
        refusal = said_by_process_0(refusal)
        if refusal:
            raise InputError(refusal)
        yield (lambda: None) if lock is None else lock.check
    finally:
        if lock is not None:
            lock.release()


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock.

    Attributes:
      host: the machine's name, for messages.
      machine: identifies the machine and container in which `process` is a process number.
      process: process number of the run's process 0.
      started: start time of that process in the system's count; a later process with the same number has another one.
      processes: number of the run's processes.
      since: the time at which the lock was taken, for messages.
      token: random text that identifies the lock.
    """

    host: str
    machine: str
    process: int
    started: str
    processes: int
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, which began at {self.since}"


class Lock:
    """A lock, taken by the constructor and held until it is released.

    Raises:
      InputError: another run holds the lock.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._file = lock_file(workdir / LOCK_FILE)
        number = os.getpid()
        self._own = Holder(
            *(socket.gethostname(), _machine(), number, _started(number) or ""),
            *(jax.process_count(), _now(), secrets.token_hex(8)),
        )
        self._lost_to = ""
        self._acquire()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises an InputError if the lock was lost."""
        if self._lost_to:
            raise InputError(
                f"this run was not heard of for so long that {self._lost_to} has taken over '{self._workdir}'."
            )

    def release(self) -> None:
        """Removes the lock, if this process still holds it."""
        # First the thread, which could write the file anew after it is removed.
        self._ends.set()
        self._thread.join()
        if not self._lost_to:
            with contextlib.suppress(Exception):  # the next run takes over a lock that is left behind
                content = self._file.read()
                if content is not None and _token(content) == self._own.token:
                    self._file.remove(content)

    def _content(self) -> bytes:
        # Always of the same length, so that `refresh` on a disk overwrites the old content exactly.
        return json.dumps(dataclasses.asdict(self._own) | {"alive": _now()}).encode()

    def _acquire(self) -> None:
        first: bytes | None = None  # the content at the start of the wait; a change of it is a sign of life
        since = time.monotonic()
        while True:
            content = self._file.read()
            if content is None:
                if self._file.create(self._content()):
                    return
                continue  # another process was faster
            if _token(content) == self._own.token:
                return  # this process created it, but the bucket's answer was lost
            holder = _holder(content)
            who = str(holder or "a process that does not say who it is")
            here = holder is not None and holder.machine == self._own.machine
            runs = holder is not None and here and _started(holder.process) == holder.started
            waited = time.monotonic() - since
            # Wait for a sign of life: briefly for a process that runs here, up to SILENCE_SECONDS for any other.
            if first is None and (runs or not here):
                first, since = content, time.monotonic()
                if not here:
                    limit = f"waiting up to {SILENCE_SECONDS} s for a sign of it"
                    print(f"'{self._workdir}' was being written by {who}; {limit}.", flush=True)
            elif (runs and waited >= GRACE_SECONDS) or (first is not None and content != first):
                raise InputError(
                    f"'{self._workdir}' is being written by {who}: wait for its end, or choose another --workdir."
                )
            elif (here and not runs) or waited >= SILENCE_SECONDS:
                if self._file.take_over(content, self._content()):
                    print(
                        f"Took over '{self._workdir}' from {who} and {'is gone' if here else 'is silent'}.", flush=True
                    )
                    return
                first = None  # another process took it over: start again with that one
                continue
            time.sleep(POLL_SECONDS)

    def _beat(self) -> None:
        while not self._lost_to and not self._ends.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the network may fail for a moment; the next beat is soon
                self._say_alive()

    def _say_alive(self) -> None:
        content = self._file.read()
        holder = None if content is None else _holder(content)
        if content is None:  # a person has removed it
            self._file.create(self._content())
        elif holder is None:  # damaged: it names no other holder
            self._file.take_over(content, self._content())
        elif holder.token == self._own.token:
            self._file.refresh(content, self._content())
        else:
            self._lost_to = str(holder)


def _holder(content: bytes) -> Holder | None:
    """The holder that a lock's content names; None if the content is damaged or still being written."""
    try:
        fields: dict[str, Any] = json.loads(content)
        return Holder(**{field.name: fields[field.name] for field in dataclasses.fields(Holder)})
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _token(content: bytes) -> str:
    holder = _holder(content)
    return "" if holder is None else holder.token


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _machine() -> str:
    """Identifies the namespace of process numbers: a machine since its last boot, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(number: int) -> str | None:
    """The start time of a process on this machine in the system's count, "" if unknown; None if it has ended."""
    if not Path("/proc/self/stat").exists():  # not Linux
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # The second field is the program's name in brackets, which may contain spaces and brackets itself.
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started  # a zombie: dead, but its parent has not collected its status yet
