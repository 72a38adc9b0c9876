"""Several processes that run one program: how they find each other, and how they end together."""

import contextlib
import os
import sys
from typing import NoReturn

import jax
from etils import epath

from castling_jax.ops.errors import InputError

HEARTBEAT_SECONDS = 20  # after so long without a sign of a process, JAX ends the others


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; must come before anything else that JAX does.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which this one is. With all three None the hosts of a TPU pod find each other, and anywhere else this
        is the only process.

    Raises:
      InputError: one is given without the others, or they do not fit each other.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
            return
        with contextlib.suppress(ValueError):  # JAX sees no cluster here
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator, --num_processes and --process_id go together: give all three or none.")
    if process_id >= num_processes:
        raise InputError(f"--process_id must be from 0 to {num_processes - 1}, not {process_id}.")
    if ":" not in coordinator:
        raise InputError(f"--coordinator must be HOST:PORT, not {coordinator!r}.")
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def use_compilation_cache(folder: epath.Path) -> None:
    """Keeps compiled programs in a folder, so that a run that goes on need not compile again.

    Where the environment names a cache (JAX_COMPILATION_CACHE_DIR), that is used.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def end(sentence: str) -> NoReturn:
    """Says why, and ends this process with status 1; at once where there are others, which may be waiting for it."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        sys.exit(sentence)
    print(f"[process {jax.process_index()}] {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
