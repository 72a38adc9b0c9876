"""Calls of the TPU kernels, recorded while a program is traced, so that each of them can be made again by itself."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_recorded: contextvars.ContextVar[list["Call"] | None] = contextvars.ContextVar("recorded_calls", default=None)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that a kernel serves.

    Attributes:
      operation: "linear_angular_attention" or "masked_softmax_attention".
      arrays: the operation's arrays by their arguments' names, as shapes; without those that are None.
      options: its other arguments.
    """

    operation: str
    arrays: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """A list that gets every call of a kernel that is traced inside the context, each kind of call once."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def record(operation: str, arrays: dict[str, Any], **options: Any) -> None:
    """Notes a call, where a record is kept."""
    calls = _recorded.get()
    if calls is None:
        return
    shapes = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), array)
        for name, array in arrays.items()
        if array is not None
    }
    call = Call(operation, shapes, options)
    if call not in calls:
        calls.append(call)
