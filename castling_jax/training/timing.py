"""Timing functions against each other on the machine at hand."""

import math
import statistics
import time
from collections.abc import Callable

import jax


def interleaved_seconds(functions: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns, so that whatever else the machine does falls on all of them alike.

    Args:
      functions: what to time, by name; each is called once before, to be compiled.
      repeats: how many calls of each are timed.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def significant(value: float, digits: int = 3) -> str:
    """The number written out, with at least so many significant digits: 0.00412, 33.7, 1,296."""
    if not value:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def spread(values: list[float]) -> dict[str, float]:
    """The smallest, the median and the largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
