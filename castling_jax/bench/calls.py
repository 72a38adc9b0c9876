"""Times calls in turns, so that other work on the machine slows all of them alike."""

import math
from collections.abc import Callable
from typing import Any

from castling_jax.bench.rivals import SOFTMAX
from castling_jax.training.timing import interleaved_seconds, spread

TOKENS_A_CALL = 2048
PASSES = {False: "forward", True: "forward and backward"}

Row = dict[str, Any]


def batch_of(tokens: int) -> int:
    """The power of two that makes about TOKENS_A_CALL tokens a call, and at least 1."""
    return 2 ** max(0, int(math.log2(TOKENS_A_CALL / tokens)))


def time_group(calls: dict[str, Callable[[], object]], repeats: int) -> list[Row]:
    """Times calls in turns.

    Returns:
      A row for each call: name, milliseconds {min, median, max}, and, where softmax is one of the calls,
      ratio_to_softmax {min, median, max} of each repeat's time to softmax's in the same repeat.
    """
    seconds = interleaved_seconds(calls, repeats=repeats)
    rows = []
    for name, values in seconds.items():
        row: Row = {"name": name, "milliseconds": spread([1e3 * value for value in values])}
        # Ratios within a repeat: other work on the machine slowed both calls.
        if SOFTMAX in seconds:
            row["ratio_to_softmax"] = spread([a / b for a, b in zip(values, seconds[SOFTMAX], strict=True)])
        rows.append(row)
    return rows
