"""The spectral-angle kernel, its series, and linear-angular attention (Castling-ViT, section 4.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from castling_jax.errors import InputError
from castling_jax.ops.activations import activate
from castling_jax.ops.around import NOTHING, Around, normalize_qkv, with_norms
from castling_jax.ops.checks import check_implementation, check_qkv, check_query_values
from castling_jax.ops.depthwise import check_token_kernel, depthwise_convolution
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.norms import l2_normalize
from castling_jax.ops.precision import precision_of
from castling_jax.ops.tokens import QueryValues, tokens_of, values_of_queries


def _cosines(
    q: Float[Array, "batch queries heads key_dim"], k: Float[Array, "batch keys heads key_dim"]
) -> Float[Array, "batch heads queries keys"]:
    products = jnp.einsum("bqhd,bkhd->bhqk", l2_normalize(q), l2_normalize(k), precision=precision_of(q.dtype))
    return jnp.clip(products, -1, 1)


@on_auto_axes(lambda q: split_as(q, 0, 2, 1))
def angular_kernel(
    q: Float[Array, "batch queries heads key_dim"], k: Float[Array, "batch keys heads key_dim"]
) -> Float[Array, "batch heads queries keys"]:
    """The exact kernel Sim(q, k) = 1 - theta(q, k) / pi, in [0, 1] (equations 3 and 4); quadratic in tokens.

    theta is the angle between q and k in radians. The kernel has a kink where q and k are parallel or opposite. Its
    gradient is defined as zero there, so that it is finite everywhere. A zero vector counts as orthogonal to all
    vectors, Sim = 1/2, and passes no gradient.

    Raises:
      InputError: the shapes do not fit.
    """
    check_qkv(q, k)
    cosines = _cosines(q, k)
    at_kink = jnp.abs(cosines) >= 1
    angles = jnp.where(at_kink, jnp.where(cosines > 0, 0, jnp.pi), jnp.arccos(jnp.where(at_kink, 0, cosines)))
    return 1 - angles / jnp.pi


def arcsine_coefficients(order: int | np.integer) -> np.ndarray:
    """Coefficients of c, c^3, ..., c^(2 order + 1) in arcsin(c): (2i)! / (2^2i (i!)^2 (2i + 1))."""
    # (2i)! / (2^2i (i!)^2) as a running product, because the factorials themselves overflow for a long series.
    binomials = np.cumprod([1.0] + [(2 * i - 1) / (2 * i) for i in range(1, order + 1)])
    return binomials / (2 * np.arange(order + 1) + 1)


@on_auto_axes(lambda q: split_as(q, 0, 2, 1))
def angular_kernel_series(
    q: Float[Array, "batch queries heads key_dim"], k: Float[Array, "batch keys heads key_dim"], order: int | np.integer
) -> Float[Array, "batch heads queries keys"]:
    """Sim(q, k) = 1/2 + arcsin(cos theta) / pi as a series up to the power 2 order + 1 of cos theta (equation 5).

    With order = 0 only the two linear-angular terms remain, 1/2 + cos(theta) / pi.

    Raises:
      InputError: the shapes do not fit, or `order` is not an integer of at least 0.
    """
    check_qkv(q, k)
    if not isinstance(order, int | np.integer) or order < 0:
        raise InputError(f"order must be an integer of at least 0, not {order!r}.")
    cosines = _cosines(q, k)
    highest_first = jnp.asarray(arcsine_coefficients(order)[::-1], cosines.dtype)
    return 0.5 + cosines * jnp.polyval(highest_first, cosines * cosines) / jnp.pi


@on_auto_axes(lambda q: split_as(q, 0, 1, 2))
@jax.named_scope("angular")
def angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """Sim(Q, K) V with the exact kernel, without normalisation or taps; quadratic in tokens.

    It differs from linear-angular attention by the remainder of the series and by the constant term, which is
    1/2 sum_j v_j here and 1/2 V in the paper's linear form (equation 7).

    Raises:
      InputError: the shapes do not fit.
    """
    check_qkv(q, k, v)
    kernel = angular_kernel(q, k)
    return jnp.einsum("bhqk,bkhd->bqhd", kernel, v, precision=precision_of(v.dtype)).astype(v.dtype)


@jax.named_scope("linear_angular")
def linear_angular_core(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    query_values: Float[Array, "batch queries heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """1/2 V + (1/pi) Q^ (K^^T V), before the output normalisation, in float32 or wider (equation 7).

    The constant term of the kernel would give 1/2 sum_j v_j. The paper and its authors' code have 1/2 V instead.
    """
    # All in float32, because not every platform multiplies bfloat16 with a float32 sum. A TPU, where that is faster,
    # turns float32 products into bfloat16 ones at default precision.
    wide = jnp.promote_types(v.dtype, jnp.float32)
    # Swapping tokens and heads once moves whole rows. Left to the products, a CPU would transpose every matrix.
    q, k, v, query_values = (_swap_tokens_and_heads(x).astype(wide) for x in (q, k, v, query_values))
    key_values = jnp.einsum("bhkd,bhke->bhde", l2_normalize(k), v)
    core = 0.5 * query_values + jnp.einsum("bhqd,bhde->bhqe", l2_normalize(q), key_values) / jnp.pi
    return _swap_tokens_and_heads(core)


def _swap_tokens_and_heads(x: Float[Array, "batch first second dim"]) -> Float[Array, "batch second first dim"]:
    return jnp.swapaxes(x, 1, 2)


def normalize_and_convolve(
    core: Float[Array, "batch queries heads value_dim"],
    query_values: Float[Array, "batch queries heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None,
    *,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
) -> Float[Array, "batch queries heads value_dim"]:
    """l2normalise(core) + DWConv(V), the end of every form of the attention, in query_values' dtype."""
    # Swapped as in `linear_angular_core`, so that a CPU normalises in the same pass as the product before.
    out = _swap_tokens_and_heads(l2_normalize(_swap_tokens_and_heads(core))).astype(query_values.dtype)
    if token_kernel is None:
        return out
    return out + depthwise_convolution(query_values, token_kernel, grid=grid, prefix_tokens=prefix_tokens)


@on_auto_axes(lambda q: split_as(q, 0, 1, 2))
def linear_angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None = None,
    *,
    query_values: QueryValues = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    around: Around = NOTHING,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads value_dim"]:
    """Linear-angular attention, the inference form: l2normalise(1/2 V + Q^ (K^^T V) / pi) + DWConv(V).

    Linear in tokens (equations 7 and 8, with the output normalisation of the authors' block).

    Args:
      q: queries with norms from 1e-9 to 1e19, which are normalised here. A zero vector normalises to zero and passes no
        gradient of its own. The same holds where the sum of both terms is zero.
      k: keys, normalised likewise.
      v: values, never normalised.
      token_kernel: the taps that convolve the values, as `depthwise_convolution` takes them.
      query_values: the values at the queries' positions, where queries and keys are different tokens. Where the queries
        stand on some of the keys' tokens, the indices of these tokens instead: integers [queries], in NumPy.
      grid: (height, width) of the queries, for taps over the grid.
      prefix_tokens: leading queries that the taps leave out.
      around: norms of q, k and v before anything else, and an activation of the output.
      implementation: "xla"; "pallas", fused TPU kernels (interpreted, and slow, on a CPU); or "auto", the kernels where
        the program is lowered for a TPU and they take these arguments, "xla" elsewhere.

    Returns:
      The attention's output, in v's dtype.

    Raises:
      InputError: shapes do not fit, the kernels do not take the arguments, queries and keys differ in number and
        query_values is missing, or a name is unknown.
    """

    def attention(q: Array, k: Array, v: Array, around: Around) -> Array:
        return add_linear_angular(
            None,
            q,
            k,
            v,
            token_kernel,
            query_values=query_values,
            grid=grid,
            prefix_tokens=prefix_tokens,
            around=around,
            implementation=implementation,
        )

    return with_norms(attention, q, k, v, around, implementation=implementation)


def add_linear_angular(
    auxiliary: Float[Array, "batch queries heads value_dim"] | None,
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None,
    *,
    query_values: QueryValues,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
    around: Around,
    implementation: str,
) -> Float[Array, "batch queries heads value_dim"]:
    """activation(l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V)), like `linear_angular_attention`."""
    check_implementation(implementation)
    check_qkv(q, k, v)
    check_query_values(q, v, query_values)
    if token_kernel is not None:
        check_token_kernel(token_kernel, q.shape[1], q.shape[2], grid, prefix_tokens)

    # Token indices are static (NumPy): keep them out of the traced arguments.
    tokens = tokens_of(query_values)
    value_array = None if query_values is None or tokens is not None else jnp.asarray(query_values, v.dtype)

    def plain(q, k, v, token_kernel, value_array, auxiliary, norms):
        q, k, v = normalize_qkv(q, k, v, norms)
        query_values = values_of_queries(v, tokens if value_array is None else value_array)
        core = linear_angular_core(q, k, v, query_values)
        core = core if auxiliary is None else core + auxiliary.astype(core.dtype)
        out = normalize_and_convolve(core, query_values, token_kernel, grid=grid, prefix_tokens=prefix_tokens)
        return activate(out, around.activation)

    if implementation == "xla":
        return plain(q, k, v, token_kernel, value_array, auxiliary, around.norms)
    from castling_jax.ops.tpu import attention as kernels  # here, because importing Pallas takes a while

    return kernels.linear_angular_attention(
        q,
        k,
        v,
        token_kernel,
        value_array,
        auxiliary,
        around.norms,
        query_tokens=tokens,
        grid=grid,
        prefix_tokens=prefix_tokens,
        activation=around.activation,
        fallback=plain if implementation == "auto" else None,
    )
