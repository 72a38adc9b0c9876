"""One writer at a time in a run's folder.

WORKDIR/lock says who writes: host, process, since when. While the run lives it says so anew every BEAT_SECONDS, and it
is removed when the run ends, however it does, but for a SIGKILL or a machine that is gone. What such an end leaves
behind is taken over: at once where the process was of this machine and is gone, and otherwise when nothing was heard of
it for SILENCE_SECONDS. That is measured while waiting for it, so that no two clocks are compared.

Of several who try, one succeeds (lock_file.py). A process that was asleep for so long that it lost its lock notices at
the next sign it gives.
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
GRACE_SECONDS = 5  # for a process that was killed just now to be gone
POLL_SECONDS = 1


@contextlib.contextmanager
def one_writer(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """Makes a run's folder, and holds its lock while the block lasts. All processes make the call.

    Yields:
      What raises an InputError, in process 0, once another run has taken the lock over.

    Raises:
      InputError: another run holds it, or the folder cannot be written to; on all processes.
    """
    lock, refusal = None, ""
    try:
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
    """Who holds a lock.

    Attributes:
      host: the machine's name, for a person.
      machine: tells whether process numbers mean the same as here.
      process: the number of the run's process 0.
      started: when that was, as the system counts; so that another process of its number is not taken for it.
      processes: how many the run has.
      since: the time at which the lock was taken.
      token: drawn for each lock.
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
    """A lock that is held from here on, until it is released.

    Raises:
      InputError: another run holds it.
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
        """Removes the lock, if it still is this one's."""
        self._ends.set()
        self._thread.join()
        if not self._lost_to:
            with contextlib.suppress(Exception):  # what stays behind is taken over by the next
                found = self._file.read()
                if found is not None and _token(found) == self._own.token:
                    self._file.remove(found)

    def _content(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._own) | {"alive": _now()}).encode()  # always of one length

    def _acquire(self) -> None:
        first: bytes | None = None
        since = time.monotonic()
        while True:
            found = self._file.read()
            if found is None:
                if self._file.create(self._content()):
                    return
                continue
            if _token(found) == self._own.token:
                return  # a bucket's answer to its making was lost
            holder = _holder(found)
            who = str(holder or "a process that does not say who it is")
            here = holder is not None and holder.machine == self._own.machine
            runs = holder is not None and here and _started(holder.process) == holder.started
            waited = time.monotonic() - since
            if first is None and (runs or not here):
                first, since = found, time.monotonic()
                if not here:
                    limit = f"waiting up to {SILENCE_SECONDS} s for a sign of it"
                    print(f"'{self._workdir}' was being written by {who}; {limit}.", flush=True)
            elif (runs and waited >= GRACE_SECONDS) or (first is not None and found != first):
                raise InputError(
                    f"'{self._workdir}' is being written by {who}: wait for its end, or choose another --workdir."
                )
            elif (here and not runs) or waited >= SILENCE_SECONDS:
                if self._file.take_over(found, self._content()):
                    print(
                        f"Took over '{self._workdir}' from {who} and {'is gone' if here else 'is silent'}.", flush=True
                    )
                    return
                first = None  # another one did
                continue
            time.sleep(POLL_SECONDS)

    def _beat(self) -> None:
        while not self._lost_to and not self._ends.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a network that is away for a moment; the next sign is soon
                self._say_alive()

    def _say_alive(self) -> None:
        found = self._file.read()
        holder = None if found is None else _holder(found)
        if found is None:  # removed by a person
            self._file.create(self._content())
        elif holder is None:
            self._file.take_over(found, self._content())
        elif holder.token == self._own.token:
            self._file.refresh(found, self._content())
        else:
            self._lost_to = str(holder)


def _holder(content: bytes) -> Holder | None:
    """Who a lock says holds it; None where it is damaged, or still being written."""
    try:
        found: dict[str, Any] = json.loads(content)
        return Holder(**{field.name: found[field.name] for field in dataclasses.fields(Holder)})
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _token(content: bytes) -> str:
    holder = _holder(content)
    return "" if holder is None else holder.token


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _machine() -> str:
    """Where process numbers mean the same: a machine since its last start, and on it a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def _started(number: int) -> str | None:
    """When a process of this machine was started, as the system counts; None where it has ended."""
    if not Path("/proc/self/stat").exists():  # no Linux
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # The second field is a name in brackets, in which anything may stand.
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started  # dead, though nobody has asked yet what it died of
