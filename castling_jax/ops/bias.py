"""The bias that is added to attention scores: one array, or two factors whose outer sum is the bias."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.errors import check
from castling_jax.ops.checks import check_array

Bias = (
    Float[Array, "#batch heads queries keys"]
    | tuple[Float[Array, "#batch heads queries key_rows"], Float[Array, "#batch heads queries key_columns"]]
)


def check_bias(q: jax.Array, k: jax.Array, bias: Bias) -> None:
    """Raises an InputError unless the bias, or both its factors, are floating arrays that fit the queries and keys."""
    parts, wanted = (bias, 2) if isinstance(bias, tuple | list) else ((bias,), 1)
    for part in parts:
        check_array("bias", part)
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    shapes = [part.shape for part in parts]
    fit = [len(shape) == 4 and shape[0] in (1, batch) and shape[1:3] == (heads, queries) for shape in shapes]
    # The last axis of one array has all keys; the last axes of two factors have the key rows and the key columns.
    check(
        len(parts) == wanted and all(fit) and math.prod(shape[3] for shape in shapes) == keys,
        f"bias must be [1 or {batch}, {heads} heads, {queries} queries, {keys} keys], or a pair of such arrays for key "
        f"rows and columns, whose product is {keys}, not of shape {' and '.join(map(str, shapes))}.",
    )


def dense_bias(bias: Bias) -> Float[Array, "#batch heads queries keys"]:
    """The bias as one array: two factors become their outer sum over key rows and key columns, in float32 or wider."""
    if not isinstance(bias, tuple | list):
        return bias
    rows, columns = (factor.astype(jnp.promote_types(factor.dtype, jnp.float32)) for factor in bias)
    total = rows[..., :, None] + columns[..., None, :]
    return total.reshape(*total.shape[:3], -1)
