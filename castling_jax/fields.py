"""A field of a configuration: its default, the values it takes, and what it means."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import config_dict

from castling_jax.errors import InputError, check_known


@dataclasses.dataclass(frozen=True)
class Values:
    """The values that a field takes.

    Attributes:
      type: the type that the command line converts a value to.
      text: the values in words, to complete "must be ...".
      allows: tells whether a value is allowed. It never sees None: a field whose default is None takes None as well.
      names: all values, if they are names.
    """

    type: type
    text: str
    allows: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises an InputError unless `value` is allowed; `name` is what the message calls it."""
        if self.names:
            check_known(name, value, self.names)
        elif not self.allows(value):
            raise InputError(f"{name} must be {self.text}, not {repr(value)[:100]}.")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the configuration, on one line: default, values, meaning."""

    default: Any
    values: Values
    meaning: str

    @property
    def placeholder(self) -> Any:
        """The default as a ConfigDict stores it: None becomes a typed placeholder, which the command line can set."""
        return config_dict.placeholder(self.values.type) if self.default is None else self.default

    def check(self, name: str, value: Any) -> None:
        """Raises an InputError unless the field called `name` takes `value`."""
        if value is not None or self.default is not None:
            self.values.check(name, value)


def integer(low: int, high: int | None = None) -> Values:
    """Integers from `low` to `high`, or from `low` on."""
    text = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return Values(int, text, lambda value: _is_integer(value) and low <= value <= (math.inf if high is None else high))


def number(interval: str) -> Values:
    """Numbers in an interval written as in mathematics, such as "[0, 1)"; "inf" is its open end."""
    low, high = map(float, interval[1:-1].split(","))

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = low <= value if interval[0] == "[" else low < value  # False for NaN, whose comparisons all are
        return above and (value <= high if interval[-1] == "]" else value < high)

    shown = interval[1:-1].split(",")[0]
    beyond = f"a finite number of at least {shown}" if interval[0] == "[" else f"a finite number above {shown}"
    return Values(float, beyond if math.isinf(high) else f"a number in {interval}", allows)


def numbers(count: int, text: str, allows: Callable[[Any], bool]) -> Values:
    """Sequences of `count` finite numbers that `allows` accepts; `text` describes them."""

    def all_allowed(values: Any) -> bool:
        return (
            isinstance(values, tuple | list)
            and len(values) == count
            and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            and allows(values)
        )

    return Values(tuple, text, all_allowed)


def one_of(*names: str) -> Values:
    """One of these names."""
    return Values(str, "one of " + ", ".join(names), lambda value: value in names, names)


TEXT = Values(str, "a string", lambda value: isinstance(value, str))
FLAG = Values(bool, "True or False", lambda value: isinstance(value, bool))
IMAGE_SIZE = Values(
    object,
    "a positive integer, or a height and a width",
    lambda value: all(
        _is_integer(side) and side > 0
        for side in (value if isinstance(value, tuple | list) and len(value) == 2 else [value])
    ),
)
SIZES = Values(
    object,
    "an integer or a tuple of integers",
    lambda value: all(map(_is_integer, value)) if isinstance(value, tuple | list) else _is_integer(value),
)


def plain(value: Any) -> Any:
    """The value in types of Python that can be hashed and written as JSON.

    NumPy's numbers become Python's, arrays and lists tuples, and a dict its pairs, sorted by key.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return tuple(sorted((word, plain(item)) for word, item in value.items()))
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
