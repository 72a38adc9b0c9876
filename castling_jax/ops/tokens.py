"""Some of the tokens: where queries stand on a part of what the keys do."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# So many tokens are selected by products: of more these would be dearer than what is done with the tokens.
MAX_MULTIPLIED = 4096

# The values at the queries' positions: None where queries and keys are the same tokens, those of the keys' tokens that
# the queries stand on, or values of their own.
QueryValues = Float[Array, "batch queries heads value_dim"] | Int[np.ndarray, "queries"] | None


def select_tokens(
    x: Float[Array, "batch tokens *axes"], tokens: Int[np.ndarray, "selected"]
) -> Float[Array, "batch selected *axes"]:
    """x[:, tokens], of tokens that are known when it is traced and, on a TPU, finite."""
    if x.shape[1] > MAX_MULTIPLIED:
        return x[:, tokens]
    flat = x.reshape(*x.shape[:2], -1)
    # On a TPU a product with zeros and ones reads what other slices would first have to lay out anew.
    selected = jax.lax.platform_dependent(flat, tpu=lambda x: _multiply(x, tokens), default=lambda x: x[:, tokens])
    return selected.reshape(x.shape[0], len(tokens), *x.shape[2:])


def _multiply(x: jax.Array, tokens: np.ndarray) -> jax.Array:
    return jnp.einsum("qk,bkc->bqc", selection(tokens, x.shape[1], x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def selection(tokens: Int[np.ndarray, "selected"], count: int, dtype: jnp.dtype) -> Float[Array, "selected tokens"]:
    """The matrix of zeros and ones whose product with `count` tokens is some of them."""
    return jax.nn.one_hot(tokens, count, dtype=dtype)


def tokens_of(query_values: QueryValues) -> Int[np.ndarray, "queries"] | None:
    """The tokens by which query values are said; None where they are not."""
    if isinstance(query_values, np.ndarray) and np.issubdtype(query_values.dtype, np.integer):
        return query_values
    return None


def values_of_queries(
    v: Float[Array, "batch keys heads value_dim"], query_values: QueryValues
) -> Float[Array, "batch queries heads value_dim"]:
    """The values at the queries' positions, as they are given or from those of the keys."""
    tokens = tokens_of(query_values)
    if tokens is not None:
        return select_tokens(v, tokens)
    return v if query_values is None else jnp.asarray(query_values, v.dtype)
