"""Times functions against each other on this machine."""

import math
import statistics
import time
from collections.abc import Callable

import jax


def interleaved_seconds(
    functions: dict[str, Callable[[], object]], *, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call. The functions are called in turns, so that other load on the machine slows all alike.

    Args:
      functions: name -> function to time; each is called once before, to compile it.
      repeats: number of timed calls of each function.
      clock: what is read before and after a call; time.process_time counts the CPU time of all threads.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            seconds[name].append(clock() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list of seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def significant(value: float, digits: int = 3) -> str:
    """The number written out, with at least `digits` significant digits: 0.00412, 33.7, 1,296."""
    if not value:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def spread(values: list[float]) -> dict[str, float]:
    """The smallest value, the median and the largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
