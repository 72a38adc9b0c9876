"""Keeping freed memory in the process, which on a CPU is much of the time."""

import ctypes
import sys

# Names of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has glibc's malloc keep what is freed; to be called before JAX has run anything.

    Every call of a compiled function allocates its temporaries anew. By default those over 32 MiB, and of other threads
    even smaller ones, go back to the system when they are freed, and the system hands them out again page by page,
    zeroed: up to half the time of a call. The process then stays as large as it has once been.

    Returns:
      Whether it was done: not where the C library is not glibc, or refuses.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    # One arena, as the others' are of 64 MiB at most; no mapping of its own for anything; never trimmed.
    return all(mallopt(name, value) for name, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
