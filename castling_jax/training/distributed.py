"""Several processes that run one program: how they find each other, and how they end together."""

import contextlib
import json
import multiprocessing
import os
import secrets
import sys
import time
import zlib
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from castling_jax.errors import InputError, check_between

HEARTBEAT_SECONDS = 20  # after so long without a sign from one process, JAX ends the others
SHARING_SECONDS = 40  # network file systems may take so long to show another host's file
SENTENCE_BYTES = 2048
CACHED_SECONDS = 0.1  # JAX keeps programs from 1 s on; reading one takes some 10 ms from a disk, 50 ms from a bucket
SHUTDOWN_SECONDS = 3600  # the others wait so long at the end, while process 0 writes the summary


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; must be called before anything else in JAX.

    If all three arguments are None, the hosts of a TPU pod find each other, and anywhere else this is the only process.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      InputError: only some of them are given, or they do not fit each other.
    """
    if (coordinator, num_processes, process_id) == (None, None, None):
        if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
            return
        with contextlib.suppress(ValueError):  # JAX raises it outside a cluster
            _initialize()
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator, --num_processes and --process_id go together: give all three or none.")
    check_between("--process_id", process_id, 0, num_processes - 1)
    if ":" not in coordinator:
        raise InputError(f"--coordinator must be HOST:PORT, not {coordinator!r}.")
    _initialize(coordinator, num_processes, process_id)


def _initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def check_shared(folder: epath.Path) -> None:
    """Raises an InputError on all processes unless all see the same folder; otherwise the first save would hang."""
    if jax.process_count() > 1 and not _all_see(folder):
        raise InputError(f"not all processes see one '{folder}': give a --workdir that all hosts share, gs:// will do.")


def _all_see(folder: epath.Path) -> bool:
    """Whether all processes see the same folder. Process 0 creates it, and writes a file that the others look for."""
    # A new number each time: a file left by an earlier start proves nothing.
    token = str(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    file = folder / "shared"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    multihost_utils.sync_global_devices("shared")
    end = time.monotonic() + SHARING_SECONDS
    while not (seen := file.exists() and file.read_text() == token) and time.monotonic() < end:
        time.sleep(1)
    all_see = multihost_utils.process_allgather(np.bool_(seen)).all()
    if jax.process_index() == 0:
        file.unlink()
    return bool(all_see)


def refuse_different_data(data: dict[str, Any]) -> None:
    """Raises an InputError on all processes unless all have the same fingerprint of the data; they read parts of it."""
    if jax.process_count() == 1:
        return
    digest = np.uint32(zlib.crc32(json.dumps(data, sort_keys=True).encode()))
    if len(np.unique(multihost_utils.process_allgather(digest))) > 1:
        raise InputError(
            f"not all processes see the same data (this one has {data['training']['images']:,} images to learn from): "
            "give all hosts the same files, classes and versions."
        )


def said_by_process_0(sentence: str) -> str:
    """Returns process 0's `sentence` on all processes; cut to SENTENCE_BYTES."""
    if jax.process_count() == 1:
        return sentence
    # A broadcast needs the same shape on all processes, so the text is padded to a fixed length.
    data = np.frombuffer(sentence.encode()[:SENTENCE_BYTES].ljust(SENTENCE_BYTES, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().rstrip(b"\0").decode(errors="ignore")


def use_compilation_cache(folder: epath.Path) -> None:
    """Keeps compiled programs in a folder, so that a resumed run need not compile again.

    Where the environment names a cache (JAX_COMPILATION_CACHE_DIR), or how long a program must take to be kept
    (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS), it has the last word.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_SECONDS)


def has_others() -> bool:
    """Whether other processes run the same program."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def end(sentence: str, *, status: int = 1) -> NoReturn:
    """Prints why, and ends this process; at once if there are others, because a clean exit would wait for them."""
    if not has_others():
        print(sentence, file=sys.stderr, flush=True)
        sys.exit(status)
    print(f"[process {jax.process_index()}] {sentence}", file=sys.stderr, flush=True)
    end_at_once(status)


def end_quietly(status: int) -> NoReturn:
    """Ends this process without printing; at once if there are others."""
    if not has_others():
        sys.exit(status)
    end_at_once(status)


def end_at_once(status: int) -> NoReturn:
    """Ends this process without waiting for anything, and kills its reading workers, which would outlive it."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)
