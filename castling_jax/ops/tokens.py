"""Selection of tokens, for queries that stand on some of the keys' tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Up to this many tokens are selected by a product with zeros and ones. With more, the product would cost more than the
# attention that follows.
MAX_MULTIPLIED = 4096

# The values at the queries' positions: an array of values, or for each query the key token on which it stands, or None
# where queries and keys are the same tokens. Token indices are static (NumPy): keep them out of the traced arguments.
QueryValues = Float[Array, "batch queries heads value_dim"] | Int[np.ndarray, "queries"] | None


def select_tokens(
    x: Float[Array, "batch tokens *axes"], tokens: Int[np.ndarray, "selected"]
) -> Float[Array, "batch selected *axes"]:
    """x[:, tokens]. The tokens are known while tracing. On a TPU x must be finite, because all of it is multiplied."""
    if x.shape[1] > MAX_MULTIPLIED:
        return x[:, tokens]
    flat = x.reshape(*x.shape[:2], -1)
    # On a TPU a product with zeros and ones reads x as it lies. A gather would first copy x into another layout.
    selected = jax.lax.platform_dependent(flat, tpu=lambda x: _multiply(x, tokens), default=lambda x: x[:, tokens])
    return selected.reshape(x.shape[0], len(tokens), *x.shape[2:])


def _multiply(x: jax.Array, tokens: np.ndarray) -> jax.Array:
    return jnp.einsum("qk,bkc->bqc", selection(tokens, x.shape[1], x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def selection(tokens: Int[np.ndarray, "selected"], count: int, dtype: jnp.dtype) -> Float[Array, "selected tokens"]:
    """The matrix of zeros and ones whose product with `count` tokens selects some of the tokens."""
    return jax.nn.one_hot(tokens, count, dtype=dtype)


def tokens_of(query_values: QueryValues) -> Int[np.ndarray, "queries"] | None:
    """The tokens on which the queries stand, where `query_values` names tokens; None where it does not."""
    if isinstance(query_values, np.ndarray) and np.issubdtype(query_values.dtype, np.integer):
        return query_values
    return None


def values_of_queries(
    v: Float[Array, "batch keys heads value_dim"], query_values: QueryValues
) -> Float[Array, "batch queries heads value_dim"]:
    """The values at the queries' positions: the given ones, those of the named tokens, or `v`."""
    tokens = tokens_of(query_values)
    if tokens is not None:
        return select_tokens(v, tokens)
    return v if query_values is None else jnp.asarray(query_values, v.dtype)
