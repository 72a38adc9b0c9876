"""Linear attentions from other papers, to compare castling with: their cost is linear in tokens, not quadratic.

All of them compute in float32 at least. The ReLU, focused and performer attentions share one formula,
out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j), and differ in the features phi.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax.models.layers import Layers
from castling_jax.ops.bias import Bias, dense_bias
from castling_jax.ops.checks import is_known_empty
from castling_jax.ops.masked_softmax import masked_weights
from castling_jax.ops.norms import l2_normalize
from castling_jax.ops.precision import precision_of

RELU_EPSILON = 1e-15  # added to the denominator, as in EfficientViT's code; float32 can hold its square
FOCUSING_POWER = 3  # p in FLatten's models
FOCUSED_EPSILON = 1e-6  # added to the mean weight of the keys, as in FLatten's code
PERFORMER_EPSILON = 1e-6  # added to features of at most 1: the numerical stabilizer in Performer's code
PERFORMER_SEED = 0


def _wide(x: jax.Array, v: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(v.dtype, jnp.float32))


def _weighted_sums(
    q: Float[Array, "batch queries heads features"],
    k: Float[Array, "batch keys heads features"],
    v: Float[Array, "batch keys heads value_dim"],
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, "batch queries heads 1"]]:
    """sum_j (q_i . k_j) v_j and sum_j q_i . k_j: numerator and denominator."""
    # K^T V first: it has no axis of queries, so no array has an entry for each pair of a query and a key.
    product = functools.partial(jnp.einsum, precision=precision_of(v.dtype))
    numerator = product("bqhd,bhde->bqhe", q, product("bkhd,bkhe->bhde", k, _wide(v, v)))
    return numerator, product("bqhd,bhd->bqh", q, jnp.sum(k, axis=1))[..., None]


@jax.named_scope("relu_linear")
def relu_linear_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """relu(Q) (relu(K)^T V) / (relu(Q) sum_j relu(k_j)) (Cai et al., EfficientViT, 2023, equation 2).

    Where a query's weights are zero for all keys, numerator and denominator are zero, and the output is zero.
    """
    out, total = _weighted_sums(_wide(jax.nn.relu(q), v), _wide(jax.nn.relu(k), v), v)
    return (out / (total + RELU_EPSILON)).astype(v.dtype)


@jax.named_scope("focused_linear")
def focused_linear_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    focus_scale: Float[Array, "heads key_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """Focused linear attention (Han et al., FLatten Transformer, ICCV 2023, equations 5 and 6).

    phi(x) = f(relu(x) / softplus(focus_scale)) with f(x) = |x| / |x^3| x^3, which keeps the norm of x and turns x
    towards its largest channels. The learned scale of each channel is in the published code, not in the equations.
    Three things differ from that code. Each norm is taken over one head's channels, as in the equations; the code takes
    it over the channels of all heads. The code's learned positions of the keys are left out, because the backbones have
    positions. And 1e-6 is added to the denominator only, not to the features as well, so that a zero vector has zero
    weights and no gradient. The depthwise convolution of the values (equation 7) is the token kernel.
    """
    scale = jax.nn.softplus(_wide(focus_scale, v))
    q, k = (_focus(jax.nn.relu(_wide(x, v)) / scale) for x in (q, k))
    out, total = _weighted_sums(q, k, v)
    # Both are divided by the number of keys, so that the epsilon's share does not depend on the grid.
    keys = k.shape[1]
    return (out / keys / (total / keys + FOCUSED_EPSILON)).astype(v.dtype)


def _focus(x: Float[Array, "*axes key_dim"]) -> Float[Array, "*axes key_dim"]:
    """|x| / |x^p| x^p; zero, with no gradient, at zero."""
    direction = l2_normalize(x)
    # <x, x / |x|> is |x|, whose gradient here is finite at zero. The direction's powers cannot underflow together.
    return jnp.sum(x * direction, axis=-1, keepdims=True) * l2_normalize(direction**FOCUSING_POWER)


def focus_parameters(module: Any, layers: Layers) -> dict[str, nnx.Param]:
    """Focused linear attention's scales, which start at softplus(0) = ln 2."""
    return {"focus_scale": layers.zeros(module.num_heads, module.key_dim)}


def performer_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """FAVOR+, an unbiased estimate of softmax attention (Choromanski et al., ICLR 2021, section 2.3 and lemma 1).

    The directions are constants, `random_directions` from NumPy's generator with seed 0: the same in every layer, head
    and run, and never drawn again. Their number is m = key_dim round(ln key_dim), the paper's order d log d (theorem 4)
    in whole orthogonal blocks: 256 for key_dim = 64, as in the authors' code.
    """
    key_dim = q.shape[3]
    return favor_attention(q, k, v, random_directions(key_dim * max(1, round(math.log(key_dim))), key_dim))


@functools.cache
def random_directions(count: int, key_dim: int) -> np.ndarray:
    """[count, key_dim]: orthogonal blocks whose rows have the norms of normal vectors (section 2.4), from seed 0."""
    rng = np.random.default_rng(PERFORMER_SEED)
    q, r = np.linalg.qr(rng.normal(size=(-(-count // key_dim), key_dim, key_dim)))
    # The signs that LAPACK gives Q's columns depend on the axes, which would bias the estimate. A positive diagonal of
    # R makes Q uniform over all rotations and reflections.
    q *= np.sign(np.einsum("bii->bi", r))[:, None]
    norms = np.linalg.norm(rng.normal(size=(count, key_dim)), axis=1, keepdims=True)
    return norms * np.swapaxes(q, 1, 2).reshape(-1, key_dim)[:count]


@jax.named_scope("performer")
def favor_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    directions: Float[np.ndarray, "features key_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """Attention with the positive features phi(x) = exp(w . x - |x|^2 / 2) / sqrt(m) for x = q or k / key_dim^(1/4).

    E phi(q) . phi(k) = exp(q . k / sqrt(key_dim)), so the attention converges to softmax attention as m grows. 1e-6 is
    added to each feature, so that no denominator is zero.
    """
    product = functools.partial(jnp.einsum, precision=precision_of(v.dtype))
    q, k = (_wide(x, v) / q.shape[3] ** 0.25 for x in (q, k))
    weights = jnp.asarray(directions, q.dtype)
    q_log = product("bqhd,md->bqhm", q, weights)
    k_log = product("bkhd,md->bkhm", k, weights) - jnp.sum(k * k, axis=-1, keepdims=True) / 2
    # Factors that all weights of a query share cancel in the quotient. So 1 / sqrt(m) and |q|^2 / 2 are left out, and
    # a maximum is subtracted for each query and for all keys of a head: no exponential overflows, and the largest
    # feature is 1.
    q_log -= jax.lax.stop_gradient(jnp.max(q_log, axis=3, keepdims=True))
    k_log -= jax.lax.stop_gradient(jnp.max(k_log, axis=(1, 3), keepdims=True))
    out, total = _weighted_sums(jnp.exp(q_log) + PERFORMER_EPSILON, jnp.exp(k_log) + PERFORMER_EPSILON, v)
    return (out / total).astype(v.dtype)


def linear_taylor_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """(sum_j v_j + Q (K^^T V) / sqrt(key_dim)) / N with K^ = K less its mean over the N keys.

    This is softmax attention with exp(s) = 1 + s, its first-order expansion (Dass et al., ViTALiTy, HPCA 2023,
    algorithm 1). Centring the keys does not change the softmax and makes the scores small. The paper's denominator
    N + q . sum_j k^_j / sqrt(key_dim) is N, because centred keys sum to zero.
    """
    return _from_heads(_taylor_of_heads(*_to_heads(q, k, v), precision_of(v.dtype)), v)


def taylor_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    mask_threshold: ArrayLike,
    bias: Bias | None = None,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """ViTALiTy's training form: `linear_taylor_attention` + (M * (P - T)) V, with the mask density.

    T_ij = (1 + q_i . k^_j / sqrt(key_dim)) / N are the Taylor weights, P = softmax(Q K^T / sqrt(key_dim) + bias), and
    M = 1[P > mask_threshold] keeps the strong weights, which the Taylor weights miss. At threshold 0 the sum is softmax
    attention, and from 1 on it is `linear_taylor_attention`. The mask passes no gradient of its own.

    The paper computes the mask from 4-bit scores (Sanger's), with a constant threshold that its code sets to 0.002.
    Here the mask compares the exact weights, and the threshold rises as castling's does. `bias` only enters P.
    """
    precision = precision_of(v.dtype)
    q_heads, k_heads, v_heads = _to_heads(q, k, v)
    out = _taylor_of_heads(q_heads, k_heads, v_heads, precision)
    density = jnp.zeros((), jnp.float32)
    if not is_known_empty(mask_threshold):
        with jax.named_scope("taylor_branch"):
            scores = jnp.einsum("bhqd,bhkd->bhqk", q_heads, k_heads, precision=precision)
            taylor_weights = (1 + scores) / scores.shape[3]
            weights, kept = masked_weights(scores if bias is None else scores + dense_bias(bias), mask_threshold)
            # T has no bias, as it has none after the switch, where linear attention has no scores to add one to.
            strong = jnp.where(kept, weights - taylor_weights, 0)
            out = out + jnp.einsum("bhqk,bhkd->bhqd", strong, v_heads, precision=precision)
            density = jnp.sum(kept, dtype=jnp.float32) / float(max(kept.size, 1))
    return _from_heads(out, v), density


def _to_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries, centred keys, and values, with the heads beside the batch."""
    q, k, v = (jnp.swapaxes(_wide(x, v), 1, 2) for x in (q, k, v))
    return q / math.sqrt(q.shape[3]), k - jnp.mean(k, axis=2, keepdims=True), v


def _from_heads(out: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


@jax.named_scope("linear_taylor")
def _taylor_of_heads(q: jax.Array, k: jax.Array, v: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
    product = functools.partial(jnp.einsum, precision=precision)
    return (jnp.sum(v, axis=2, keepdims=True) + product("bhqd,bhde->bhqe", q, product("bhkd,bhke->bhde", k, v))) / (
        v.shape[2]
    )
