"""The masked softmax branch: softmax attention whose small weights are masked out (Castling-ViT, section 4.2)."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float

from castling_jax.ops.around import ChannelNorms, normalize_qkv
from castling_jax.ops.bias import Bias, check_bias, dense_bias
from castling_jax.ops.checks import check_implementation, check_qkv, is_known_empty
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.precision import precision_of


@on_auto_axes(lambda q: (split_as(q, 0, 1, 2), PartitionSpec()))
def masked_softmax_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    mask_threshold: ArrayLike,
    bias: Bias | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """(M * P) V with P = softmax(Q K^T / sqrt(key_dim) + bias) and M = 1[P > threshold] (equation 9).

    q and k are not normalised, P is not renormalised after the mask, and the mask passes no gradient of its own.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask_threshold: a scalar of at least 0. Weights at or below it are masked out. From 1 on the mask is empty by
        definition. If the threshold is concrete, the branch is then not computed at all.
      bias: added to the scaled scores. Dense, [1 or batch, heads, queries, keys], or a pair of factors whose outer sum
        is the bias, [1 or batch, heads, queries, key_rows] and [1 or batch, heads, queries, key_columns]. The kernels
        round factors to q's dtype.
      implementation: "xla"; "pallas", fused TPU kernels (interpreted, and slow, on a CPU); or "auto", the kernels where
        the program is lowered for a TPU and they take these arguments, "xla" elsewhere.

    Returns:
      The branch's output in v's dtype, and the mask density: the share of weights that is kept, a float32 scalar.

    Raises:
      InputError: shapes do not fit, the kernels do not take the arguments, the threshold is negative or NaN (where it
        is concrete), or a name is unknown.
    """
    return masked_softmax_first(
        q, k, v, mask_threshold=mask_threshold, bias=bias, implementation=implementation, return_qkv=False
    )[:2]


def masked_softmax_first(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    mask_threshold: ArrayLike,
    bias: Bias | None,
    norms: ChannelNorms | None = None,
    implementation: str,
    return_qkv: bool = True,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""], tuple[Array, Array, Array]]:
    """`masked_softmax_attention`, and the q, k and v that the attention after it should use.

    With `return_qkv` the kernels return q, k and v as outputs. If the next attention uses these, its gradients of q, k
    and v arrive in the branch's backward kernel, which adds its own to them. That saves a pass over memory for each.
    Without `return_qkv`, and without kernels, q, k and v are returned as they came. They are not normalised by `norms`.
    """
    check_implementation(implementation)
    check_qkv(q, k, v)
    if bias is not None:
        check_bias(q, k, bias)
    if is_known_empty(mask_threshold):
        return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), jnp.zeros((), jnp.float32), (q, k, v)
    if implementation == "xla":
        return _plain(q, k, v, mask_threshold, bias, norms)
    from castling_jax.ops.tpu import attention as kernels  # here, because importing Pallas takes a while

    fallback = _plain if implementation == "auto" else None
    return kernels.masked_softmax_attention(
        q, k, v, mask_threshold, bias, norms, return_qkv=return_qkv, fallback=fallback
    )


@jax.named_scope("masked_softmax")
def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_threshold: ArrayLike,
    bias: Bias | None,
    norms: ChannelNorms | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    qkv = q, k, v
    q, k, v = normalize_qkv(q, k, v, norms)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    # Swapping tokens and heads once, and scaling queries rather than scores, both save a CPU passes over memory.
    q, k, v_wide = (jnp.swapaxes(x, 1, 2).astype(wide) for x in (q, k, v))
    precision = precision_of(v.dtype)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q / math.sqrt(q.shape[3]), k, precision=precision)
    if bias is not None:
        scores = scores + dense_bias(bias).astype(wide)
    weights, kept = masked_weights(scores, mask_threshold)
    out = jnp.einsum("bhqk,bhkd->bhqd", jnp.where(kept, weights, 0), v_wide, precision=precision)
    # Counted in float32, because the batch of a pod has more weights than an int32 counts.
    density = jnp.sum(kept, dtype=jnp.float32) / float(max(kept.size, 1))
    return jnp.swapaxes(out, 1, 2).astype(v.dtype), density, qkv


def masked_weights(
    scores: Float[Array, "batch heads queries keys"], mask_threshold: ArrayLike
) -> tuple[Float[Array, "batch heads queries keys"], Bool[Array, "batch heads queries keys"]]:
    """P = softmax(scores), and the mask M = 1[P > threshold], which is empty from a threshold of 1 on."""
    weights = jax.nn.softmax(scores, axis=-1)
    threshold = jnp.asarray(mask_threshold, weights.dtype)
    # An empty mask needs its own condition, because rounding can lift a weight above 1. The comparison is negated, so
    # that NaN passes the mask, reaches the output and is noticed.
    return weights, ~(weights <= threshold) & (threshold < 1)
