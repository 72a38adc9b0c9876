"""The bias that is added to attention scores: one array, or two factors whose outer sum is the bias."""

import jax
from jaxtyping import Array, Float

from castling_jax.errors import InputError
from castling_jax.ops.checks import check_array

Bias = (
    Float[Array, "#batch heads queries keys"]
    | tuple[Float[Array, "#batch heads queries key_rows"], Float[Array, "#batch heads queries key_columns"]]
)


def check_bias(q: jax.Array, k: jax.Array, bias: Bias) -> None:
    """Raises an InputError unless the bias, or both its factors, are floating arrays that fit the queries and keys."""
    for part in bias if isinstance(bias, tuple | list) else (bias,):
        check_array("bias", part)
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if isinstance(bias, tuple | list):
        if len(bias) != 2 or any(
            factor.ndim != 4 or factor.shape[0] not in (1, batch) or factor.shape[1:3] != (heads, queries)
            for factor in bias
        ):
            shapes = [factor.shape for factor in bias]
            raise InputError(
                f"a factored bias must be a pair [batch, {heads} heads, {queries} queries, key rows or columns], "
                f"not of shapes {shapes}."
            )
        rows, columns = bias
        if rows.shape[3] * columns.shape[3] != keys:
            raise InputError(
                f"a bias for {rows.shape[3]} key rows times {columns.shape[3]} columns does not fit {keys} keys."
            )
    elif bias.ndim != 4 or bias.shape[0] not in (1, batch) or bias.shape[1:] != (heads, queries, keys):
        raise InputError(
            f"bias must be of shape [1 or {batch}, {heads} heads, {queries} queries, {keys} keys], not {bias.shape}."
        )


def dense_bias(bias: Bias) -> Float[Array, "#batch heads queries keys"]:
    """The bias as one array: two factors become their outer sum over key rows and key columns."""
    if not isinstance(bias, tuple | list):
        return bias
    rows, columns = bias
    total = rows[..., :, None] + columns[..., None, :]
    return total.reshape(*total.shape[:3], -1)
