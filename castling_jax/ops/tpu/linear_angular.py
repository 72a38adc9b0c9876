"""Linear-angular attention in one kernel, forward and backward: norms, products, output norm and token kernel.

A grid step has all tokens of one image and some heads in fast memory, so that q, k, v and the output cross HBM once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from castling_jax.ops.activations import activate
from castling_jax.ops.norms import inverse_norms, inverse_norms_or_zero
from castling_jax.ops.tokens import selection
from castling_jax.ops.tpu.call import ABSENT, Operand, Refs, call, whole
from castling_jax.ops.tpu.channel_norms import norm_gradients, norm_inputs, norm_outputs, read, through_channel_norm
from castling_jax.ops.tpu.layout import (
    LANES,
    NN,
    NT,
    TN,
    Heads,
    arrange,
    compiler_params,
    product,
    same_head,
    traced_once,
)
from castling_jax.ops.tpu.taps import TapPositions, spread_taps, tap_positions

STATIC = ("heads", "positions", "query_tokens", "activation", "interpret")


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Size of one head's part of the forward kernel's blocks: q, k, v, query values, auxiliary output and output."""
    return itemsize * ((queries + keys) * key_dim + (3 * queries + keys) * value_dim)


def needed_bytes(q, k, v, taps, *, query_tokens, grid) -> int:
    """The least fast memory that the backward kernel needs, for one group of heads, in bytes.

    It has nine blocks with two buffers each, some 12 float32 arrays of the size of a block, and what stays beside them.
    """
    heads = arrange_heads(q, k, v, blocks=9)
    tokens = max(q.shape[1], k.shape[1])
    blocks = heads.group * tokens * max(heads.key_dim, heads.value_dim) * (2 * 9 * q.dtype.itemsize + 12 * 4)
    return blocks + _staying_bytes(heads, q, k, tap_positions(taps, grid), query_tokens)


def _staying_bytes(layout: Heads, q, k, positions: TapPositions, query_tokens) -> int:
    """Size of what stays in fast memory: padded copies of two arrays, and two buffers of the selection of tokens."""
    copies = 2 * positions.scratch_bytes(q.shape[1], window_heads(layout) * layout.value_dim)
    return copies + (0 if query_tokens is None else 2 * q.shape[1] * k.shape[1] * k.dtype.itemsize)


def linear_angular(
    q,
    k,
    v,
    query_values,
    taps,
    auxiliary,
    norms,
    *,
    query_tokens: np.ndarray | None,
    grid: tuple[int, int] | None,
    activation: str | None,
    interpret: bool,
):
    """activation(l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V)), differentiable.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      query_values: V in 1/2 V and in DWConv(V), [batch, queries, heads, value_dim]. None where `v` has these values.
      taps: the token kernel, [taps, heads], or [rows, columns, heads] with a grid, or None.
      auxiliary: added before the normalisation, shaped like the output; or None.
      norms: batch norm's mean, factor and bias for each channel of q, k and v, [3, heads, dim] each; or None.
      query_tokens: the key tokens on which the queries stand; None where it is all of them.
      grid: (height, width) of the queries, for taps in rows and columns.
      activation: a name of ACTIVATIONS, or None.
      interpret: run as plain JAX, on any platform.
    """
    heads, value_dim = v.shape[2:]
    q, k, v, query_values, auxiliary = (
        None if x is None else x.reshape(*x.shape[:2], -1) for x in (q, k, v, query_values, auxiliary)
    )
    norms = jax.tree.map(lambda norm: norm.reshape(3, -1), norms)
    positions = tap_positions(taps, grid)
    tokens = None if query_tokens is None else tuple(query_tokens.tolist())  # hashable, as static arguments must be
    taps = spread_taps(taps, heads, value_dim)
    out = _attention(q, k, v, query_values, taps, auxiliary, norms, heads, positions, tokens, activation, interpret)
    return out.reshape(*q.shape[:2], heads, value_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10, 11))
def _attention(q, k, v, query_values, taps, auxiliary, norms, *static):
    return _forward(q, k, v, query_values, taps, auxiliary, norms, *static)[0]


@traced_once(*STATIC)
def _forward(q, k, v, query_values, taps, auxiliary, norms, heads, positions, query_tokens, activation, interpret):
    layout = _arrange(q, k, v, heads, blocks=5)
    out = jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), v.dtype)
    outputs = call(
        functools.partial(_forward_kernel, layout=layout, positions=positions, activation=activation),
        inputs=_inputs(layout, q, k, v, query_values, taps, auxiliary, norms, None, query_tokens),
        outputs={"out": (out, _token_blocks(q, layout, layout.value_dim))},
        scratch={"padded": positions.scratch(q.shape[1], window_heads(layout) * layout.value_dim)},
        grid=(q.shape[0], layout.steps),
        compiler_params=_parameters(layout, q, k, positions, query_tokens),
        interpret=interpret,
        name="linear_angular_forward",
    )
    return outputs["out"], (q, k, v, query_values, taps, auxiliary, norms)


@traced_once(*STATIC)
def _backward(heads, positions, query_tokens, activation, interpret, residuals, cotangent):
    q, k, v, query_values, taps, auxiliary, norms = residuals
    layout = _arrange(q, k, v, heads, blocks=9)
    inputs = _inputs(layout, q, k, v, query_values, taps, auxiliary, norms, cotangent, query_tokens)
    # Images are worked on in parallel, so that each has its own sum for the taps.
    d_taps = jax.ShapeDtypeStruct((q.shape[0], *taps.shape), jnp.float32)
    d_taps_blocks = pl.BlockSpec((1, taps.shape[0], layout.step_heads * layout.value_dim), lambda b, h: (b, 0, h))
    padded = positions.scratch(q.shape[1], window_heads(layout) * layout.value_dim)
    gradients = call(
        functools.partial(_backward_kernel, layout=layout, positions=positions, activation=activation),
        inputs=inputs,
        outputs={f"d_{name}": inputs[name] for name in ("q", "k", "v", "query_values", "auxiliary")}
        | {"d_taps": (d_taps, d_taps_blocks)}
        | norm_outputs(norms, layout.step_widths, q.shape[0], axes=(0, 1)),
        scratch={"padded": padded, "padded_cotangent": padded},
        grid=(q.shape[0], layout.steps),
        compiler_params=_parameters(layout, q, k, positions, query_tokens),
        interpret=interpret,
        name="linear_angular_backward",
    )
    gradients["d_taps"] = gradients["d_taps"].sum(0)
    of_arrays = (gradients[f"d_{name}"] for name in ("q", "k", "v", "query_values", "taps", "auxiliary"))
    return *of_arrays, norm_gradients(norms, gradients)


_attention.defvjp(_forward, _backward)


def arrange_heads(q, k, v, blocks: int) -> Heads:
    """How a kernel with so many blocks works on the heads of q, k and v, [batch, tokens, heads, dim]."""
    size = block_bytes(q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype.itemsize) * blocks // 5
    return arrange(q.shape[2], q.shape[3], v.shape[3], bytes_per_head=size)


def _arrange(q, k, v, heads, blocks):
    q, k, v = (jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[2] // heads), x.dtype) for x in (q, k, v))
    return arrange_heads(q, k, v, blocks)


def _parameters(layout, q, k, positions, query_tokens):
    size = block_bytes(q.shape[1], k.shape[1], layout.key_dim, layout.value_dim, q.dtype.itemsize)
    staying = _staying_bytes(layout, q, k, positions, query_tokens)
    return compiler_params("parallel", "parallel", block_bytes=layout.step_heads * size, staying_bytes=staying)


def _token_blocks(x, layout: Heads, dim: int) -> pl.BlockSpec:
    """All tokens of an image and the heads of a step, for a grid of (image, step along the heads)."""
    return pl.BlockSpec((1, x.shape[1], layout.step_heads * dim), lambda b, h: (b, 0, h))


def _inputs(layout, q, k, v, query_values, taps, auxiliary, norms, cotangent, query_tokens) -> dict[str, Operand]:
    """The inputs of both kernels; the forward kernel has no cotangent."""
    out_blocks = _token_blocks(q, layout, layout.value_dim)
    return {
        "q": (q, _token_blocks(q, layout, layout.key_dim)),
        "k": (k, _token_blocks(k, layout, layout.key_dim)),
        "v": (v, _token_blocks(k, layout, layout.value_dim)),
        "taps": (taps, pl.BlockSpec((taps.shape[0], layout.step_heads * layout.value_dim), lambda b, h: (0, h))),
        **norm_inputs(norms, layout.step_widths, step=1),
        **{name: whole(x) for name, x in head_sums(layout, window_heads(layout), q.dtype).items()},
        "cotangent": (cotangent, out_blocks),
        "selection": ABSENT if query_tokens is None else whole(selection(np.array(query_tokens), k.shape[1], k.dtype)),
        "query_values": (query_values, out_blocks),
        "auxiliary": (auxiliary, out_blocks),
    }


def window_heads(layout: Heads) -> int:
    """The number of heads in a window of the keys and values."""
    return len(layout.windows(layout.key_dim, layout.value_dim)[0][0])


def head_sums(layout: Heads, heads: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Three matrices of zeros and ones, from `same_head`, that say which lanes belong to the same head.

    `key_sums` and `value_sums` sum over heads for the norms: each is for as few heads as fill whole registers, at most
    `heads`. `cross` has keys in rows and values in columns, for the product of `heads` heads.
    """
    key_dim, value_dim = layout.key_dim, layout.value_dim
    keys, values = (min(heads, math.lcm(dim, LANES) // dim) for dim in (key_dim, value_dim))
    return {
        "key_sums": same_head(keys, key_dim, key_dim, dtype),
        "value_sums": same_head(values, value_dim, value_dim, dtype),
        "cross": same_head(heads, key_dim, value_dim, dtype),
    }


def _cross_of(keys: slice, values: slice, cross_ref):
    """`cross` for a window's keys and values, over pi. The last window may have fewer heads than the others."""
    return cross_ref[: keys.stop - keys.start, : values.stop - values.start].astype(jnp.float32) / math.pi


def _sum_heads(dot, x, sums):
    """The sum over each head's lanes, in all of these lanes; `sums` is `same_head` for the heads of one product."""
    parts = [x[:, start : start + len(sums)] for start in range(0, x.shape[1], len(sums))]
    return jnp.concatenate([dot(part, sums[: part.shape[1], : part.shape[1]], NN) for part in parts], axis=1)


def head_inverse_norms(dot, x, sums):
    """`inverse_norms` of each head, in all of its lanes; `sums` is `key_sums` or `value_sums` from `head_sums`."""
    return inverse_norms(_sum_heads(dot, x * x, sums))


def head_inverse_norms_or_zero(dot, x, sums):
    """`inverse_norms_or_zero` of each head, likewise. Only gradients need the zeros, and forward kernels save them."""
    return inverse_norms_or_zero(_sum_heads(dot, x * x, sums))


def through_norm(dot, d_normal, normal, inverse, sums):
    """The gradient of x from the gradient of its normal x / |x|."""
    return inverse * (d_normal - normal * _sum_heads(dot, d_normal * normal, sums))


def _query_values(dot, v, refs: Refs, values: slice):
    """A window's values at the queries' positions: the given ones, those of selected tokens, or v."""
    if refs.query_values is not None:
        return refs.query_values[0, :, values].astype(jnp.float32)
    return v.astype(jnp.float32) if refs.selection is None else dot(refs.selection[...], v, NN)


def attend(dot, refs: Refs, lanes: tuple[slice, slice], q, k, v, *, query_values, auxiliary=None):
    """l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) for a window's heads, in float32.

    `refs` has the matrices of `head_sums`; `lanes` are those of the window's keys and values.
    """
    key_sums, value_sums = refs.key_sums[...], refs.value_sums[...]
    normal_k = k * head_inverse_norms(dot, k, key_sums)
    key_values = dot(normal_k, v, TN) * _cross_of(*lanes, refs.cross)
    normal_q = q * head_inverse_norms(dot, q, key_sums)
    core = 0.5 * query_values + dot(normal_q, key_values, NN)
    if auxiliary is not None:
        core += auxiliary
    return core * head_inverse_norms(dot, core, value_sums)


def _forward_kernel(refs: Refs, *, layout: Heads, positions: TapPositions, activation: str | None):
    dot = product(refs.q.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        q, k = (read(refs, name, keys).astype(jnp.float32) for name in ("q", "k"))
        v = read(refs, "v", values)
        query_values = _query_values(dot, v, refs, values)
        auxiliary = None if refs.auxiliary is None else refs.auxiliary[0, :, values].astype(jnp.float32)
        out = attend(dot, refs, (keys, values), q, k, v, query_values=query_values, auxiliary=auxiliary)
        out += positions.convolve(refs.padded, query_values, refs.taps[:, values])
        refs.out[0, :, values] = activate(out, activation).astype(refs.out.dtype)


def _backward_kernel(refs: Refs, *, layout: Heads, positions: TapPositions, activation: str | None):
    dot = product(refs.q.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        key_sums, value_sums, cross = refs.key_sums[...], refs.value_sums[...], _cross_of(keys, values, refs.cross)
        wide_q, wide_k = (read(refs, name, keys).astype(jnp.float32) for name in ("q", "k"))
        wide_v = read(refs, "v", values).astype(jnp.float32)
        cotangent = refs.cotangent[0, :, values].astype(jnp.float32)
        query_values = _query_values(dot, wide_v, refs, values)
        # The forward pass again: a training step keeps only its inputs, which the model has anyway.
        inverse_k, inverse_q = (head_inverse_norms_or_zero(dot, x, key_sums) for x in (wide_k, wide_q))
        normal_k, normal_q = wide_k * inverse_k, wide_q * inverse_q
        key_values = dot(normal_k, wide_v, TN) * cross
        core = 0.5 * query_values + dot(normal_q, key_values, NN)
        if refs.auxiliary is not None:
            core += refs.auxiliary[0, :, values].astype(jnp.float32)
        inverse_core = head_inverse_norms_or_zero(dot, core, value_sums)
        normal_core = core * inverse_core
        if activation is not None:
            out = normal_core + positions.convolve(refs.padded, query_values, refs.taps[:, values])
            _, pullback = jax.vjp(functools.partial(activate, name=activation), out)
            [cotangent] = pullback(cotangent)
        d_core = through_norm(dot, cotangent, normal_core, inverse_core, value_sums)
        if refs.auxiliary is not None:
            refs.d_auxiliary[0, :, values] = d_core.astype(refs.d_auxiliary.dtype)
        d_key_values = dot(normal_q, d_core, TN) * cross
        dv = dot(normal_k, d_key_values, NN)
        dq = through_norm(dot, dot(d_core, key_values, NT), normal_q, inverse_q, key_sums)
        dk = through_norm(dot, dot(wide_v, d_key_values, NT), normal_k, inverse_k, key_sums)
        d_query_values = 0.5 * d_core
        # The transpose of a convolution is the convolution with the taps in reverse order.
        for tap, window in enumerate(positions.windows(refs.padded_cotangent, cotangent)):
            d_query_values += window * refs.taps[positions.count - 1 - tap : positions.count - tap, values]
        for tap, window in enumerate(positions.windows(refs.padded, query_values)):
            refs.d_taps[0, tap : tap + 1, values] = jnp.sum(window * cotangent, axis=0, keepdims=True)
        refs.d_q[0, :, keys] = through_channel_norm(refs, "q", keys, dq).astype(refs.d_q.dtype)
        refs.d_k[0, :, keys] = through_channel_norm(refs, "k", keys, dk).astype(refs.d_k.dtype)
        if refs.query_values is not None:
            refs.d_query_values[0, :, values] = d_query_values.astype(refs.d_query_values.dtype)
        else:
            dv += d_query_values if refs.selection is None else dot(refs.selection[...], d_query_values, TN)
        refs.d_v[0, :, values] = through_channel_norm(refs, "v", values, dv).astype(refs.d_v.dtype)
