"""Records the calls of TPU kernels while a program is traced, so that each call can be repeated on its own."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_recorded: contextvars.ContextVar[list["Call"] | None] = contextvars.ContextVar("recorded_calls", default=None)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of the kernels' operations.

    Attributes:
      operation: "linear_angular_attention" or "masked_softmax_attention".
      arrays: shapes of the operation's arrays, by the arguments' names. Arguments of None are left out.
      options: the operation's other arguments.
    """

    operation: str
    arrays: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Yields a list that gets every kernel call that is traced inside the context, equal calls once."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def record(operation: str, arrays: dict[str, Any], **options: Any) -> None:
    """Adds a call to the list of `recorded_calls`; does nothing outside of its context."""
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
