"""Checks of the arguments that all attention operations share."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from castling_jax.errors import InputError, check, check_known
from castling_jax.ops.tokens import QueryValues, tokens_of

IMPLEMENTATIONS = ("auto", "xla", "pallas")


def check_implementation(implementation: str) -> None:
    """Raises an InputError unless `implementation` is one of IMPLEMENTATIONS."""
    check_known("implementation", implementation, IMPLEMENTATIONS)


def check_array(name: str, array: Any, axes: tuple[str, ...] = ()) -> None:
    """Raises an InputError unless `array` has a floating type and, where `axes` are given, as many axes."""
    check(hasattr(array, "dtype"), f"{name} must be an array, not {type(array).__name__}.")
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        raise InputError(f"{name} must be of a floating type such as float32 or bfloat16, not {array.dtype}.")
    check(not axes or array.ndim == len(axes), f"{name} must be [{', '.join(axes)}], not of shape {array.shape}.")


def check_qkv(q: jax.Array, k: jax.Array, *values: jax.Array) -> None:
    """Raises an InputError unless q, k and the values, if any, are floating arrays whose shapes fit together."""
    for name, array in zip("qkv", (q, k, *values), strict=False):
        check_array(name, array, ("batch", "tokens", "heads", "dim"))
        if (array.shape[0], array.shape[2]) != (q.shape[0], q.shape[2]):
            raise InputError(f"{name} must have q's batch and heads: {array.shape} does not fit {q.shape}.")
    check(q.shape[3] == k.shape[3], f"q and k must have the same key_dim, not {q.shape[3]} and {k.shape[3]}.")
    for v in values:
        check(v.shape[1] == k.shape[1], f"k and v must have equally many tokens, not {k.shape[1]} and {v.shape[1]}.")


def check_query_values(q: jax.Array, v: jax.Array, query_values: QueryValues) -> None:
    """Raises an InputError unless every query has a value: its own, a named token's, or v's at its position."""
    queries, keys, tokens = q.shape[1], v.shape[1], tokens_of(query_values)
    if query_values is None:
        check(
            queries == keys,
            f"{queries} queries and {keys} keys differ: 1/2 V needs query_values [batch, queries, heads, value_dim].",
        )
    elif tokens is not None:
        check(tokens.shape == (queries,), f"query_values must name {queries} keys, one a query, not {tokens.shape}.")
        if not np.all((tokens >= 0) & (tokens < keys)):
            raise InputError(f"query_values must name keys from 0 to {keys - 1}, not {tokens.min()} to {tokens.max()}.")
    else:
        if not hasattr(query_values, "dtype") or jax.numpy.issubdtype(query_values.dtype, jax.numpy.integer):
            raise InputError("query_values that name keys must be a NumPy array: they are needed while tracing.")
        check_shapes(query_values=(query_values, (*q.shape[:3], v.shape[3])))


def concrete_threshold(mask_threshold: ArrayLike) -> float | None:
    """The threshold as a number where it is concrete; None where it is traced.

    Raises:
      InputError: the threshold is not a scalar, or it is concrete and negative or NaN.
    """
    check(np.ndim(mask_threshold) == 0, f"mask_threshold must be a scalar, not of shape {np.shape(mask_threshold)}.")
    if isinstance(mask_threshold, jax.core.Tracer):
        return None
    try:
        value = float(np.asarray(mask_threshold))
    except (TypeError, ValueError):
        raise InputError(f"mask_threshold must be a number of at least 0, not {mask_threshold!r}.") from None
    if math.isnan(value) or value < 0:
        raise InputError(f"mask_threshold must be a number of at least 0 (at 1 the mask is empty), not {value}.")
    return value


def is_known_empty(mask_threshold: ArrayLike) -> bool:
    """Whether the threshold is concrete and at least 1. The mask is then empty, and the branch need not be computed.

    Raises:
      InputError: as for `concrete_threshold`.
    """
    known = concrete_threshold(mask_threshold)
    return known is not None and known >= 1


def check_shapes(**expected: tuple[Any, tuple[Any, ...]]) -> None:
    """Raises an InputError unless each array, by its name, has the shape beside it, whose sizes may be symbolic."""
    for name, (array, shape) in expected.items():
        check(np.shape(array) == shape, f"{name} must have the shape {shape}, not {np.shape(array)}.")
