"""Linear-angular attention in two passes over blocks of tokens, for sequences that do not fit fast memory.

The first pass sums K^^T V over the keys. The second multiplies the queries with the sum. Each pass is differentiable on
its own, so the gradients take the same two passes in reverse order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from castling_jax.ops.tpu.call import Operand, Refs, call, whole
from castling_jax.ops.tpu.layout import NN, NT, TN, Heads, arrange, compiler_params, product, traced_once
from castling_jax.ops.tpu.linear_angular import head_inverse_norms, head_inverse_norms_or_zero, head_sums, through_norm
from castling_jax.ops.tpu.taps import SUBLANES, TapPositions, spread_taps

TOKEN_BLOCK = 512
MAX_TAPS = 2 * SUBLANES + 1  # more taps would reach beyond one register of each neighbouring block
_HALO = 16  # rows read from each neighbouring block: one register of bfloat16, two of float32


def linear_angular(q, k, v, query_values, taps, auxiliary, *, interpret: bool):
    """l2normalise(auxiliary + 1/2 query_values + Q^ (K^^T V) / pi) + DWConv(query_values), differentiable.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      query_values: [batch, queries, heads, value_dim].
      taps: [taps, heads], or None.
      auxiliary: added before the normalisation, shaped like query_values; or None.
      interpret: run as plain JAX, on any platform.
    """
    shape, (heads, value_dim) = query_values.shape, v.shape[2:]
    q, k, v, query_values, auxiliary = (
        None if x is None else x.reshape(*x.shape[:2], -1) for x in (q, k, v, query_values, auxiliary)
    )
    key_values = _sum_keys(k, v, heads, interpret)
    out = _attend(q, key_values, query_values, spread_taps(taps, heads, value_dim), auxiliary, heads, interpret)
    return out.reshape(shape)


def _arrange(keys, values, heads: int) -> Heads:
    """How the kernels work on the heads of [batch, tokens, heads * key_dim] and of the values, likewise flat."""
    key_dim, value_dim = keys.shape[2] // heads, values.shape[2] // heads
    block = _block(keys.shape[1])
    return arrange(
        heads, key_dim, value_dim, bytes_per_head=block * keys.dtype.itemsize * (2 * key_dim + 5 * value_dim)
    )


def _block(tokens: int) -> int:
    return min(TOKEN_BLOCK, pl.cdiv(tokens, _HALO) * _HALO)


def _parameters(layout: Heads, block: int, itemsize: int):
    size = layout.step_heads * block * itemsize * (2 * layout.key_dim + 5 * layout.value_dim)
    # Blocks of tokens are the last axis, and run in order: their sums stay in fast memory until the last block.
    return compiler_params("parallel", "parallel", "arbitrary", block_bytes=size)


def _blocks(block: int, width: int) -> pl.BlockSpec:
    """Blocks of tokens, for a grid of (image, step along the heads, block of tokens)."""
    return pl.BlockSpec((1, block, width), lambda b, h, i: (b, i, h))


def _with_halo(name: str, x, tokens: int, block: int, width: int) -> dict[str, Operand]:
    """An input in blocks of tokens, and the rows before and after each block, which the taps reach.

    At both ends of the sequence these are other rows of the array, which are read as zeros.
    """
    halos, last = block // _HALO, pl.cdiv(tokens, _HALO) - 1
    before = pl.BlockSpec((1, _HALO, width), lambda b, h, i: (b, jnp.maximum(i * halos - 1, 0), h))
    after = pl.BlockSpec((1, _HALO, width), lambda b, h, i: (b, jnp.minimum((i + 1) * halos, last), h))
    return {name: (x, _blocks(block, width)), f"{name}_before": (x, before), f"{name}_after": (x, after)}


def _sums(layout: Heads, key_values) -> Operand:
    """K^^T V, or its gradient: [batch, groups, key lanes, value lanes]."""
    shape = (1, layout.step, layout.group * layout.key_dim, layout.group * layout.value_dim)
    return key_values, pl.BlockSpec(shape, lambda b, h, i: (b, h, 0, 0))


def _valid(tokens: int, block: int, start=0, rows: int | None = None):
    """Which rows of a block are tokens, or which of `rows` rows from `start` on, counted from the block's first row."""
    rows = block if rows is None else rows
    token = pl.program_id(2) * block + start + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (token >= 0) & (token < tokens)


def _read(ref, lanes, valid):
    """A block's lanes in float32, zero in rows that are no tokens: these may hold anything, even NaN."""
    return jnp.where(valid, ref[0, :, lanes].astype(jnp.float32), 0)


# The keys' pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_keys(k, v, heads, interpret):
    return _sum_keys_forward(k, v, heads, interpret)[0]


def _key_inputs(layout: Heads, block: int, k, v, d_key_values) -> dict[str, Operand]:
    """The inputs of both kernels of this pass; the forward kernel has no `d_key_values`."""
    masks = head_sums(layout, layout.group, k.dtype)
    return {
        "k": (k, _blocks(block, layout.step_heads * layout.key_dim)),
        "v": (v, _blocks(block, layout.step_heads * layout.value_dim)),
        "d_key_values": _sums(layout, d_key_values),
        **{name: whole(masks[name]) for name in ("key_sums", "cross")},
    }


@traced_once("heads", "interpret")
def _sum_keys_forward(k, v, heads, interpret):
    layout, (batch, tokens, _) = _arrange(k, v, heads), k.shape
    block = _block(tokens)
    groups = layout.steps * layout.step
    # float32, as all sums over blocks are: hundreds of terms would lose bfloat16's few digits.
    key_values = jax.ShapeDtypeStruct(
        (batch, groups, layout.group * layout.key_dim, layout.group * layout.value_dim), jnp.float32
    )
    outputs = call(
        functools.partial(_sum_keys_kernel, layout=layout, tokens=tokens, block=block),
        inputs=_key_inputs(layout, block, k, v, None),
        outputs={"key_values": _sums(layout, key_values)},
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        compiler_params=_parameters(layout, block, k.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_sum_keys",
    )
    return outputs["key_values"], (k, v)


@traced_once("heads", "interpret")
def _sum_keys_backward(heads, interpret, residuals, d_key_values):
    k, v = residuals
    layout, (batch, tokens, _) = _arrange(k, v, heads), k.shape
    block = _block(tokens)
    inputs = _key_inputs(layout, block, k, v, d_key_values)
    gradients = call(
        functools.partial(_sum_keys_backward_kernel, layout=layout),
        inputs=inputs,
        outputs={"d_k": inputs["k"], "d_v": inputs["v"]},
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        compiler_params=_parameters(layout, block, k.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_sum_keys_backward",
    )
    return gradients["d_k"], gradients["d_v"]


_sum_keys.defvjp(_sum_keys_forward, _sum_keys_backward)


def _sum_keys_kernel(refs: Refs, *, layout: Heads, tokens: int, block: int):
    dot = product(refs.k.dtype)
    valid = _valid(tokens, block)

    @pl.when(pl.program_id(2) == 0)
    def _():
        refs.key_values[...] = jnp.zeros_like(refs.key_values)

    for group in range(layout.step):
        k, v = _read(refs.k, layout.key_lanes(group), valid), _read(refs.v, layout.value_lanes(group), valid)
        cross = refs.cross[...].astype(jnp.float32) / math.pi
        refs.key_values[0, group] += dot(k * head_inverse_norms(dot, k, refs.key_sums[...]), v, TN) * cross


def _sum_keys_backward_kernel(refs: Refs, *, layout: Heads):
    dot = product(refs.k.dtype)
    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        # Rows that are no tokens need no zeros here: no row goes into another's gradient, and they are not written.
        k, v = refs.k[0, :, keys].astype(jnp.float32), refs.v[0, :, values].astype(jnp.float32)
        d_key_values = refs.d_key_values[0, group] * (refs.cross[...].astype(jnp.float32) / math.pi)
        inverse = head_inverse_norms_or_zero(dot, k, refs.key_sums[...])
        normal = k * inverse
        refs.d_v[0, :, values] = dot(normal, d_key_values, NN).astype(refs.d_v.dtype)
        dk = through_norm(dot, dot(v, d_key_values, NT), normal, inverse, refs.key_sums[...])
        refs.d_k[0, :, keys] = dk.astype(refs.d_k.dtype)


# The queries' pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, key_values, query_values, taps, auxiliary, heads, interpret):
    return _attend_forward(q, key_values, query_values, taps, auxiliary, heads, interpret)[0]


def _query_inputs(layout, block, q, key_values, query_values, taps, auxiliary, cotangent) -> dict[str, Operand]:
    """The inputs of both kernels of this pass; the forward kernel has no cotangent."""
    tokens, value_width = q.shape[1], layout.step_heads * layout.value_dim
    masks = head_sums(layout, layout.group, q.dtype)
    return {
        **_with_halo("cotangent", cotangent, tokens, block, value_width),
        "q": (q, _blocks(block, layout.step_heads * layout.key_dim)),
        "key_values": _sums(layout, key_values),
        **_with_halo("query_values", query_values, tokens, block, value_width),
        "taps": (taps, pl.BlockSpec((taps.shape[0], value_width), lambda b, h, i: (0, h))),
        **{name: whole(masks[name]) for name in ("key_sums", "value_sums")},
        "auxiliary": (auxiliary, _blocks(block, value_width)),
    }


def _padded(layout: Heads, block: int, taps):
    return _positions(taps).scratch(block, layout.group * layout.value_dim)


def _positions(taps) -> TapPositions:
    return TapPositions(1, taps.shape[0], None)


@traced_once("heads", "interpret")
def _attend_forward(q, key_values, query_values, taps, auxiliary, heads, interpret):
    layout, (batch, tokens, _) = _arrange(q, query_values, heads), q.shape
    block = _block(tokens)
    inputs = _query_inputs(layout, block, q, key_values, query_values, taps, auxiliary, None)
    outputs = call(
        functools.partial(_attend_kernel, layout=layout, tokens=tokens, block=block),
        inputs=inputs,
        outputs={"out": inputs["query_values"]},
        scratch={"padded": _padded(layout, block, taps)},
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        compiler_params=_parameters(layout, block, q.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_attend",
    )
    return outputs["out"], (q, key_values, query_values, taps, auxiliary)


@traced_once("heads", "interpret")
def _attend_backward(heads, interpret, residuals, cotangent):
    q, key_values, query_values, taps, auxiliary = residuals
    layout, (batch, tokens, _) = _arrange(q, query_values, heads), q.shape
    block = _block(tokens)
    inputs = _query_inputs(layout, block, q, key_values, query_values, taps, auxiliary, cotangent)
    d_taps = jax.ShapeDtypeStruct((batch, *taps.shape), jnp.float32)
    d_taps_blocks = pl.BlockSpec((1, taps.shape[0], layout.step_heads * layout.value_dim), lambda b, h, i: (b, 0, h))
    padded = _padded(layout, block, taps)
    gradients = call(
        functools.partial(_attend_backward_kernel, layout=layout, tokens=tokens, block=block),
        inputs=inputs,
        outputs={f"d_{name}": inputs[name] for name in ("q", "key_values", "query_values")}
        | {"d_taps": (d_taps, d_taps_blocks), "d_auxiliary": inputs["auxiliary"]},
        scratch={"padded": padded, "padded_cotangent": padded},
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        compiler_params=_parameters(layout, block, q.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_attend_backward",
    )
    gradients["d_taps"] = gradients["d_taps"].sum(0)
    return tuple(gradients[f"d_{name}"] for name in ("q", "key_values", "query_values", "taps", "auxiliary"))


_attend.defvjp(_attend_forward, _attend_backward)


def _windows(padded_ref, refs, lanes, tokens, block, positions):
    """A block's rows, and what each tap reads for them; `refs` are the block and the rows before and after it."""
    here, before, after = refs
    first = _valid(tokens, block, -_HALO, _HALO)
    rows = _read(here, lanes, _valid(tokens, block))
    leading = _read(before, lanes, first)[-positions.pad :]
    trailing = _read(after, lanes, _valid(tokens, block, block, _HALO))[: positions.pad]
    return rows, positions.windows(padded_ref, rows, leading, trailing)


def _attend_kernel(refs: Refs, *, layout: Heads, tokens: int, block: int):
    dot, positions = product(refs.q.dtype), _positions(refs.taps)
    value_refs = refs.query_values, refs.query_values_before, refs.query_values_after
    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        q = refs.q[0, :, keys].astype(jnp.float32)
        query_values, windows = _windows(refs.padded, value_refs, values, tokens, block, positions)
        core = 0.5 * query_values + dot(
            q * head_inverse_norms(dot, q, refs.key_sums[...]), refs.key_values[0, group], NN
        )
        if refs.auxiliary is not None:
            core += refs.auxiliary[0, :, values].astype(jnp.float32)
        out = core * head_inverse_norms(dot, core, refs.value_sums[...])
        for tap, window in enumerate(windows):
            out += window * refs.taps[tap : tap + 1, values]
        refs.out[0, :, values] = out.astype(refs.out.dtype)


def _attend_backward_kernel(refs: Refs, *, layout: Heads, tokens: int, block: int):
    value_refs = refs.query_values, refs.query_values_before, refs.query_values_after
    cotangent_refs = refs.cotangent, refs.cotangent_before, refs.cotangent_after
    dot = product(refs.q.dtype)
    positions, valid = _positions(refs.taps), _valid(tokens, block)

    @pl.when(pl.program_id(2) == 0)
    def _():
        refs.d_key_values[...] = jnp.zeros_like(refs.d_key_values)
        refs.d_taps[...] = jnp.zeros_like(refs.d_taps)

    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        q = _read(refs.q, keys, valid)
        query_values, windows = _windows(refs.padded, value_refs, values, tokens, block, positions)
        cotangent, cotangent_windows = _windows(refs.padded_cotangent, cotangent_refs, values, tokens, block, positions)
        # The forward pass again: a training step keeps only its inputs.
        inverse_q = head_inverse_norms_or_zero(dot, q, refs.key_sums[...])
        normal_q = q * inverse_q
        core = 0.5 * query_values + dot(normal_q, refs.key_values[0, group], NN)
        if refs.auxiliary is not None:
            core += _read(refs.auxiliary, values, valid)
        inverse_core = head_inverse_norms_or_zero(dot, core, refs.value_sums[...])
        d_core = through_norm(dot, cotangent, core * inverse_core, inverse_core, refs.value_sums[...])
        if refs.auxiliary is not None:
            refs.d_auxiliary[0, :, values] = d_core.astype(refs.d_auxiliary.dtype)
        dq = through_norm(dot, dot(d_core, refs.key_values[0, group], NT), normal_q, inverse_q, refs.key_sums[...])
        refs.d_q[0, :, keys] = dq.astype(refs.d_q.dtype)
        refs.d_key_values[0, group] += dot(normal_q, d_core, TN)
        d_query_values = 0.5 * d_core
        # The transpose of a convolution is the convolution with the taps in reverse order.
        for tap, window in enumerate(cotangent_windows):
            d_query_values += window * refs.taps[positions.count - 1 - tap : positions.count - tap, values]
        for tap, window in enumerate(windows):
            refs.d_taps[0, tap : tap + 1, values] += jnp.sum(window * cotangent, axis=0, keepdims=True)
        refs.d_query_values[0, :, values] = d_query_values.astype(refs.d_query_values.dtype)
