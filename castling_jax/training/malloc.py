"""Keeps freed memory in the process: on a CPU, getting it back from the system takes much of the time."""

import ctypes
import glob
import os
import sys

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

# The device files of TPUs (PCI, then VFIO) and of GPUs (NVIDIA's, AMD's, and any in Windows' Linux).
ACCELERATORS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def keep_freed_memory_on_cpu() -> None:
    """Calls `keep_freed_memory` where JAX will compute on a CPU; to be called while the process has one thread."""
    # Asking JAX would start its threads.
    platforms = os.environ.get("JAX_PLATFORMS") or ("" if any(map(glob.glob, ACCELERATORS)) else "cpu")
    if platforms == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory; to be called while the process has one thread.

    Every call of a compiled function allocates its temporaries anew. By default, freed blocks over 32 MiB, and smaller
    ones in other threads, go back to the system, which hands them out again page by page, zeroed; that takes up to half
    the time of a call. With this setting the process never shrinks. If other threads have heaps of their own already,
    JAX's threads will share those, and map every block that does not fit into one anew.

    Returns:
      Whether the setting is in force; False if the C library is not glibc or refuses.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    # One arena, because the heaps of further arenas end at 64 MiB; no separate mappings for large blocks; no trimming.
    return all(mallopt(name, value) for name, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
