"""Linear-angular attention in two passes over blocks of tokens, forward and backward, for more than fit fast memory.

The first pass sums K^^T V over the keys, the second takes the queries through it; each is differentiable, and the
gradients go the same way back.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from castling_jax.ops.tpu.layout import NN, NT, TN, Heads, arrange, compiler_params, product, traced_once
from castling_jax.ops.tpu.linear_angular import head_inverse_norms, head_inverse_norms_or_zero, head_sums, through_norm
from castling_jax.ops.tpu.taps import SUBLANES, Taps, spread_taps

TOKEN_BLOCK = 512
MAX_TAPS = 2 * SUBLANES + 1  # those that need no more than a register of each neighbouring block
_HALO = 16  # rows of the neighbouring blocks that are read, in whole registers of either type


def linear_angular(q, k, v, query_values, taps, auxiliary, *, interpret: bool):
    """l2normalise(auxiliary + 1/2 query_values + Q^ (K^^T V) / pi) + DWConv(query_values), differentiable.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      query_values: [batch, queries, heads, value_dim].
      taps: [taps, heads], or None.
      auxiliary: what is added before the normalisation, like query_values; or None.
      interpret: run as plain JAX, on any platform.
    """
    heads = v.shape[2]
    flat = [None if x is None else x.reshape(*x.shape[:2], -1) for x in (q, k, v, query_values, auxiliary)]
    key_values = _sum_keys(flat[1], flat[2], heads, interpret)
    out = _attend(flat[0], key_values, flat[3], spread_taps(taps, *v.shape[2:]), flat[4], heads, interpret)
    return out.reshape(query_values.shape)


def _arrange(keys, values, heads: int) -> Heads:
    """The heads of [batch, tokens, heads * key_dim] and of the values; blocks are small, so that all fit one step."""
    key_dim, value_dim = keys.shape[2] // heads, values.shape[2] // heads
    block = _block(keys.shape[1])
    return arrange(
        heads, key_dim, value_dim, bytes_per_head=block * keys.dtype.itemsize * (2 * key_dim + 5 * value_dim)
    )


def _block(tokens: int) -> int:
    return min(TOKEN_BLOCK, pl.cdiv(tokens, _HALO) * _HALO)


def _parameters(layout: Heads, block: int, itemsize: int):
    size = layout.step_heads * block * itemsize * (2 * layout.key_dim + 5 * layout.value_dim)
    # The blocks of tokens come last, and one after the other: their sums stay in fast memory.
    return compiler_params("parallel", "parallel", "arbitrary", block_bytes=size)


def _tokens_spec(block: int, width: int):
    return pl.BlockSpec((1, block, width), lambda b, h, i: (b, i, h))


def _halo_specs(tokens: int, block: int, width: int):
    """The rows before and after a block; at the ends they are some of the array's own, and not to be used."""
    halos, last = block // _HALO, pl.cdiv(tokens, _HALO) - 1
    return [
        pl.BlockSpec((1, _HALO, width), lambda b, h, i: (b, jnp.maximum(i * halos - 1, 0), h)),
        pl.BlockSpec((1, _HALO, width), lambda b, h, i: (b, jnp.minimum((i + 1) * halos, last), h)),
    ]


def _whole_spec(shape):
    return pl.BlockSpec(shape, lambda b, h, i: (0,) * len(shape))


def _sums_spec(layout: Heads):
    """Of K^^T V: [batch, groups, key lanes, value lanes]."""
    shape = (1, layout.step, layout.group * layout.key_dim, layout.group * layout.value_dim)
    return pl.BlockSpec(shape, lambda b, h, i: (b, h, 0, 0))


def _sums_shape(layout: Heads, batch: int):
    groups = layout.steps * layout.step
    return jax.ShapeDtypeStruct(
        (batch, groups, layout.group * layout.key_dim, layout.group * layout.value_dim), jnp.float32
    )


def _valid(tokens: int, block: int, start=0, rows: int | None = None):
    """Which rows of a block, or of `rows` from `start` within it on, are tokens at all."""
    rows = block if rows is None else rows
    place = pl.program_id(2) * block + start + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (place >= 0) & (place < tokens)


def _read(ref, lanes, valid):
    """A block's lanes in float32, zero where there is no token: what lies there may be anything, NaN too."""
    return jnp.where(valid, ref[0, :, lanes].astype(jnp.float32), 0)


# The keys' pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_keys(k, v, heads, interpret):
    return _sum_keys_forward(k, v, heads, interpret)[0]


@traced_once("heads", "interpret")
def _sum_keys_forward(k, v, heads, interpret):
    layout, (batch, tokens, _) = _arrange(k, v, heads), k.shape
    block = _block(tokens)
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim
    constants = head_sums(layout, layout.group, k.dtype)
    key_values = pl.pallas_call(
        functools.partial(_sum_keys_kernel, layout=layout, tokens=tokens, block=block),
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        in_specs=[
            _tokens_spec(block, key_width),
            _tokens_spec(block, value_width),
            *(_whole_spec(x.shape) for x in constants[::2]),
        ],
        out_specs=_sums_spec(layout),
        out_shape=_sums_shape(layout, batch),
        compiler_params=_parameters(layout, block, k.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_sum_keys",
    )(k, v, *constants[::2])
    return key_values, (k, v)


@traced_once("heads", "interpret")
def _sum_keys_backward(heads, interpret, residuals, d_key_values):
    k, v = residuals
    layout, (batch, tokens, _) = _arrange(k, v, heads), k.shape
    block = _block(tokens)
    key_spec = _tokens_spec(block, layout.step_heads * layout.key_dim)
    value_spec = _tokens_spec(block, layout.step_heads * layout.value_dim)
    constants = head_sums(layout, layout.group, k.dtype)
    return pl.pallas_call(
        functools.partial(_sum_keys_backward_kernel, layout=layout),
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        in_specs=[key_spec, value_spec, _sums_spec(layout), *(_whole_spec(x.shape) for x in constants[::2])],
        out_specs=[key_spec, value_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=_parameters(layout, block, k.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_sum_keys_backward",
    )(k, v, d_key_values, *constants[::2])


_sum_keys.defvjp(_sum_keys_forward, _sum_keys_backward)


def _sum_keys_kernel(k_ref, v_ref, keys_ref, cross_ref, key_values_ref, *, layout, tokens, block):
    dot = product(k_ref.dtype)
    valid = _valid(tokens, block)

    @pl.when(pl.program_id(2) == 0)
    def _():
        key_values_ref[...] = jnp.zeros_like(key_values_ref)

    for group in range(layout.step):
        k, v = _read(k_ref, layout.key_lanes(group), valid), _read(v_ref, layout.value_lanes(group), valid)
        cross = cross_ref[...].astype(jnp.float32) / math.pi
        key_values_ref[0, group] += dot(k * head_inverse_norms(dot, k, keys_ref[...]), v, TN) * cross


def _sum_keys_backward_kernel(k_ref, v_ref, d_key_values_ref, keys_ref, cross_ref, dk_ref, dv_ref, *, layout):
    dot = product(k_ref.dtype)
    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        k, v = k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values].astype(jnp.float32)
        d_key_values = d_key_values_ref[0, group] * (cross_ref[...].astype(jnp.float32) / math.pi)
        inverse = head_inverse_norms_or_zero(dot, k, keys_ref[...])
        normal = k * inverse
        dv_ref[0, :, values] = dot(normal, d_key_values, NN).astype(dv_ref.dtype)
        dk = through_norm(dot, dot(v, d_key_values, NT), normal, inverse, keys_ref[...])
        dk_ref[0, :, keys] = dk.astype(dk_ref.dtype)


# The queries' pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, key_values, v, taps, auxiliary, heads, interpret):
    return _attend_forward(q, key_values, v, taps, auxiliary, heads, interpret)[0]


def _attend_inputs(layout, q, key_values, v, taps, auxiliary, block):
    """What both kernels of this pass take, and its blocks."""
    value_width = layout.step_heads * layout.value_dim
    key_spec = _tokens_spec(block, layout.step_heads * layout.key_dim)
    value_spec = _tokens_spec(block, value_width)
    halo = _halo_specs(q.shape[1], block, value_width)
    constants = head_sums(layout, layout.group, q.dtype)[:2]
    taps_spec = pl.BlockSpec((taps.shape[0], value_width), lambda b, h, i: (0, h))
    inputs = [q, key_values, v, v, v, taps, *constants]
    specs = [key_spec, _sums_spec(layout), value_spec, *halo, taps_spec, *(_whole_spec(x.shape) for x in constants)]
    if auxiliary is not None:
        inputs, specs = [*inputs, auxiliary], [*specs, value_spec]
    return inputs, specs


def _padded(layout: Heads, block: int, taps):
    return _places(taps).scratch(block, layout.group * layout.value_dim)


def _places(taps) -> Taps:
    return Taps(1, taps.shape[0], None)


@traced_once("heads", "interpret")
def _attend_forward(q, key_values, v, taps, auxiliary, heads, interpret):
    layout, (batch, tokens, _) = _arrange(q, v, heads), q.shape
    block = _block(tokens)
    inputs, specs = _attend_inputs(layout, q, key_values, v, taps, auxiliary, block)
    out = pl.pallas_call(
        functools.partial(
            _attend_kernel, layout=layout, tokens=tokens, block=block, has_auxiliary=auxiliary is not None
        ),
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        in_specs=specs,
        out_specs=specs[2],
        out_shape=jax.ShapeDtypeStruct(v.shape, v.dtype),
        scratch_shapes=[_padded(layout, block, taps)],
        compiler_params=_parameters(layout, block, q.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_attend",
    )(*inputs)
    return out, (q, key_values, v, taps, auxiliary)


@traced_once("heads", "interpret")
def _attend_backward(heads, interpret, residuals, cotangent):
    q, key_values, v, taps, auxiliary = residuals
    layout, (batch, tokens, _) = _arrange(q, v, heads), q.shape
    block = _block(tokens)
    inputs, specs = _attend_inputs(layout, q, key_values, v, taps, auxiliary, block)
    key_spec, value_spec, halo = specs[0], specs[2], specs[3:5]
    value_width = layout.step_heads * layout.value_dim
    d_taps_spec = pl.BlockSpec((1, taps.shape[0], value_width), lambda b, h, i: (b, 0, h))
    outputs = [
        (key_spec, q),
        (_sums_spec(layout), key_values),
        (value_spec, v),
        (d_taps_spec, jax.ShapeDtypeStruct((batch, *taps.shape), jnp.float32)),
    ]
    if auxiliary is not None:
        outputs.append((value_spec, v))
    dq, d_key_values, dv, d_taps, *d_auxiliary = pl.pallas_call(
        functools.partial(
            _attend_backward_kernel, layout=layout, tokens=tokens, block=block, has_auxiliary=auxiliary is not None
        ),
        grid=(batch, layout.steps, pl.cdiv(tokens, block)),
        in_specs=[value_spec, *halo, *specs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        scratch_shapes=[_padded(layout, block, taps)] * 2,
        compiler_params=_parameters(layout, block, q.dtype.itemsize),
        interpret=interpret,
        name="linear_angular_attend_backward",
    )(cotangent, cotangent, cotangent, *inputs)
    return dq, d_key_values, dv, d_taps.sum(0), (d_auxiliary[0] if d_auxiliary else None)


_attend.defvjp(_attend_forward, _attend_backward)


def _windows(padded_ref, refs, lanes, tokens, block, places):
    """A block's rows as the taps see them, one tap after the other, and before that the rows themselves."""
    own, before, after = refs
    first = _valid(tokens, block, -_HALO, _HALO)
    rows = _read(own, lanes, _valid(tokens, block))
    leading = _read(before, lanes, first)[-places.pad :]
    trailing = _read(after, lanes, _valid(tokens, block, block, _HALO))[: places.pad]
    return rows, places.windows(padded_ref, rows, leading, trailing)


def _attend_kernel(*refs, layout, tokens, block, has_auxiliary):
    q_ref, key_values_ref, v_ref, before_ref, after_ref, taps_ref, keys_ref, values_ref, *rest = refs
    *auxiliary_ref, out_ref, padded_ref = rest
    dot, places = product(q_ref.dtype), _places(taps_ref)
    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        q = q_ref[0, :, keys].astype(jnp.float32)
        v, windows = _windows(padded_ref, (v_ref, before_ref, after_ref), values, tokens, block, places)
        core = 0.5 * v + dot(q * head_inverse_norms(dot, q, keys_ref[...]), key_values_ref[0, group], NN)
        if has_auxiliary:
            core += auxiliary_ref[0][0, :, values].astype(jnp.float32)
        out = core * head_inverse_norms(dot, core, values_ref[...])
        for tap, window in enumerate(windows):
            out += window * taps_ref[tap : tap + 1, values]
        out_ref[0, :, values] = out.astype(out_ref.dtype)


def _attend_backward_kernel(*refs, layout, tokens, block, has_auxiliary):
    cotangent_refs, inputs = refs[:3], refs[3:]  # a block, the rows before it and the rows after it
    q_ref, key_values_ref, v_ref, before_ref, after_ref, taps_ref, keys_ref, values_ref, *rest = inputs
    *auxiliary_refs, padded_ref, padded_cotangent_ref = rest
    auxiliary_ref, dq_ref, d_key_values_ref, dv_ref, d_taps_ref, d_auxiliary_ref = (
        auxiliary_refs if has_auxiliary else (None, *auxiliary_refs, None)
    )
    dot = product(q_ref.dtype)
    places, valid = _places(taps_ref), _valid(tokens, block)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_key_values_ref[...] = jnp.zeros_like(d_key_values_ref)
        d_taps_ref[...] = jnp.zeros_like(d_taps_ref)

    for group in range(layout.step):
        keys, values = layout.key_lanes(group), layout.value_lanes(group)
        q = _read(q_ref, keys, valid)
        v, windows = _windows(padded_ref, (v_ref, before_ref, after_ref), values, tokens, block, places)
        cotangent, cotangent_windows = _windows(padded_cotangent_ref, cotangent_refs, values, tokens, block, places)
        # The forward pass again: only its inputs were kept.
        inverse_q = head_inverse_norms_or_zero(dot, q, keys_ref[...])
        normal_q = q * inverse_q
        core = 0.5 * v + dot(normal_q, key_values_ref[0, group], NN)
        if has_auxiliary:
            core += _read(auxiliary_ref, values, valid)
        inverse_core = head_inverse_norms_or_zero(dot, core, values_ref[...])
        d_core = through_norm(dot, cotangent, core * inverse_core, inverse_core, values_ref[...])
        if has_auxiliary:
            d_auxiliary_ref[0, :, values] = d_core.astype(d_auxiliary_ref.dtype)
        dq = through_norm(dot, dot(d_core, key_values_ref[0, group], NT), normal_q, inverse_q, keys_ref[...])
        dq_ref[0, :, keys] = dq.astype(dq_ref.dtype)
        d_key_values_ref[0, group] += dot(normal_q, d_core, TN)
        dv = 0.5 * d_core
        # The convolution's transpose has the taps in the other order.
        for tap, window in enumerate(cotangent_windows):
            dv += window * taps_ref[places.count - 1 - tap : places.count - tap, values]
        for tap, window in enumerate(windows):
            d_taps_ref[0, tap : tap + 1, values] += jnp.sum(window * cotangent, axis=0, keepdims=True)
        dv_ref[0, :, values] = dv.astype(dv_ref.dtype)
