"""The kernels as the public operations call them: what they serve, and on which platform they run how."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from castling_jax.ops.depthwise import check_token_kernel
from castling_jax.ops.errors import InputError
from castling_jax.ops.masked_softmax import Bias
from castling_jax.ops.tpu import linear_angular, masked_softmax

INSTEAD = 'use implementation="xla", which serves all'


def linear_angular_attention(
    q: Float[Array, "batch tokens heads key_dim"],
    k: Float[Array, "batch tokens heads key_dim"],
    v: Float[Array, "batch tokens heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | None,
    *,
    auxiliary: Float[Array, "batch tokens heads value_dim"] | None = None,
    own_values: bool = False,
) -> Float[Array, "batch tokens heads value_dim"]:
    """l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), fused.

    Raises:
      InputError: queries are not the keys' tokens, there are too many tokens or taps, dtypes differ, or the platform
        is a GPU.
    """
    _check_dtypes(q, k, v)
    if own_values or q.shape[1] != k.shape[1]:
        raise InputError(f"the linear-angular kernel serves queries and keys that are the same tokens: {INSTEAD}.")
    if token_kernel is not None:
        check_token_kernel(token_kernel, v.shape[2])
        if token_kernel.ndim != 2 or token_kernel.shape[0] > linear_angular.MAX_TAPS:
            raise InputError(
                f"the linear-angular kernel serves [taps, heads] of at most {linear_angular.MAX_TAPS} taps, not "
                f"{token_kernel.shape}: {INSTEAD}."
            )
    heads = linear_angular.arrange_heads(q, v)
    size = heads.group * linear_angular.block_bytes(q.shape[1], heads.key_dim, heads.value_dim, q.dtype.itemsize)
    if size > linear_angular.MAX_BLOCK_BYTES:
        raise InputError(f"{q.shape[1]} tokens are too many for the linear-angular kernel's fast memory: {INSTEAD}.")
    return _on_platform(linear_angular.linear_angular, q, k, v, token_kernel, auxiliary)


def masked_softmax_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    mask_threshold: ArrayLike,
    bias: Bias | None,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """The masked softmax branch, fused, and its mask density.

    A bias in two factors is never expanded: the factors stand beside the queries, and beside the keys ones where a key
    lies in that row or column, so that the product of the two adds the bias.

    Raises:
      InputError: there are too many keys, dtypes differ, or the platform is a GPU.
    """
    _check_dtypes(q, k, v)
    if masked_softmax.score_bytes(q.shape[1], k.shape[1]) > masked_softmax.MAX_SCORE_BYTES:
        raise InputError(f"{k.shape[1]} keys are too many for the masked softmax kernel's fast memory: {INSTEAD}.")
    scale = 1 / math.sqrt(q.shape[3])
    if isinstance(bias, tuple | list):
        q, k = _with_factors(q, k, bias, scale)
        scale, bias = 1.0, None

    def run(q, k, v, threshold, bias, *, interpret):
        return masked_softmax.masked_softmax(q, k, v, threshold, bias, scale=scale, interpret=interpret)

    out, kept = _on_platform(run, q, k, v, jnp.asarray(mask_threshold, jnp.float32), bias)
    return out, kept / (math.prod(q.shape[:3]) * k.shape[1])


def _with_factors(q: jax.Array, k: jax.Array, factors: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    rows, columns = (jnp.moveaxis(factor, 1, 2) for factor in factors)
    rows, columns = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])).astype(q.dtype) for x in (rows, columns))
    place = jnp.arange(k.shape[1])
    in_row = jax.nn.one_hot(place // columns.shape[3], rows.shape[3], dtype=k.dtype)
    in_column = jax.nn.one_hot(place % columns.shape[3], columns.shape[3], dtype=k.dtype)
    marks = jnp.concatenate([in_row, in_column], axis=1)[None, :, None]
    marks = jnp.broadcast_to(marks, (*k.shape[:3], marks.shape[3]))
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return jnp.concatenate([scaled, rows, columns], axis=3), jnp.concatenate([k, marks], axis=3)


def _check_dtypes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise InputError(
            f"the kernels serve float32 or bfloat16, one for all, not {', '.join(sorted(dtypes))}: {INSTEAD}."
        )


def _on_platform(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Runs the kernel for the platform that is lowered for: Mosaic on a TPU, interpreted on a CPU."""
    if jax.default_backend() == "gpu":
        raise InputError(f'implementation="pallas" is for TPUs, and this is a GPU: {INSTEAD}.')
    return jax.lax.platform_dependent(
        *arguments,
        tpu=lambda *arguments: kernel(*arguments, interpret=False),
        cpu=lambda *arguments: kernel(*arguments, interpret=True),
    )
