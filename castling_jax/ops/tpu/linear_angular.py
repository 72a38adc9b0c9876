"""Linear-angular attention in one kernel, forward and backward: norms, products, output norm and token convolution.

Everything of one image and some heads is in fast memory at once, so that q, k, v and the output cross HBM once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.angular import SQUARED_NORM_EPSILON
from castling_jax.ops.tpu.layout import NN, NT, TN, Heads, arrange, compiler_params, product, same_head, traced_once

PAD = 8  # rows before and after the values in scratch: taps reach at most so far, and a register has 8 rows
MAX_TAPS = 2 * PAD + 1


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """What one head takes of the forward kernel's blocks: q, k, v, own values, the auxiliary output and the output."""
    return itemsize * ((queries + keys) * key_dim + (3 * queries + keys) * value_dim)


def needed_bytes(q, k, v) -> int:
    """What the backward kernel needs of the fast memory at the least, for one group of heads.

    Nine blocks in two buffers each, and some 14 arrays like them in float32.
    """
    heads = arrange_heads(q, k, v, blocks=9)
    tokens = max(q.shape[1], k.shape[1])
    return heads.group * tokens * max(heads.key_dim, heads.value_dim) * (2 * 9 * q.dtype.itemsize + 14 * 4)


def linear_angular(q, k, v, own, taps, auxiliary, *, interpret: bool):
    """l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), differentiable; shapes as the public operation's.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      own: the values at the queries' positions, V outside of the products; None where queries and keys are the same.
      taps: [taps, heads], or None.
      auxiliary: what is added before the normalisation, like the output; or None.
      interpret: run as plain JAX, on any platform.
    """
    heads, value_dim = v.shape[2:]
    flat = [None if x is None else x.reshape(*x.shape[:2], -1) for x in (q, k, v, own, auxiliary)]
    out = _attention(*flat[:4], spread_taps(taps, heads, value_dim), flat[4], heads, interpret)
    return out.reshape(*q.shape[:3], value_dim)


def spread_taps(taps, heads: int, value_dim: int):
    """[taps, heads] as [taps, heads * value_dim] in float32; None as one tap of zero."""
    if taps is None:
        return jnp.zeros((1, heads * value_dim), jnp.float32)
    return jnp.repeat(taps.astype(jnp.float32), value_dim, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, own, taps, auxiliary, heads, interpret):
    return _forward(q, k, v, own, taps, auxiliary, heads, interpret)[0]


@traced_once("heads", "interpret")
def _forward(q, k, v, own, taps, auxiliary, heads, interpret):
    layout = _arrange(q, k, v, heads, blocks=5)
    query_block, key_block, value_block, out_block, taps_block, *constants = _blocks(layout, q, k, taps)
    inputs = [q, k, v, taps, *head_sums(layout, _window(layout), q.dtype)]
    specs = [query_block, key_block, value_block, taps_block, *constants]
    for optional in (own, auxiliary):
        if optional is not None:
            inputs, specs = [*inputs, optional], [*specs, out_block]
    out = pl.pallas_call(
        functools.partial(_forward_kernel, layout=layout, has_own=own is not None, has_auxiliary=auxiliary is not None),
        grid=(q.shape[0], layout.steps),
        in_specs=specs,
        out_specs=out_block,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), v.dtype),
        scratch_shapes=[_padded(layout, q.shape[1])],
        compiler_params=_parameters(layout, q, k),
        interpret=interpret,
        name="linear_angular_forward",
    )(*inputs)
    return out, (q, k, v, own, taps, auxiliary)


@traced_once("heads", "interpret")
def _backward(heads, interpret, residuals, cotangent):
    q, k, v, own, taps, auxiliary = residuals
    layout = _arrange(q, k, v, heads, blocks=9)
    query_block, key_block, value_block, out_block, taps_block, *constants = _blocks(layout, q, k, taps)
    inputs = [q, k, v, taps, *head_sums(layout, _window(layout), q.dtype), cotangent]
    specs = [query_block, key_block, value_block, taps_block, *constants, out_block]
    outputs = [(query_block, q), (key_block, k), (value_block, v)]
    for optional in (own, auxiliary):
        if optional is not None:
            inputs, specs, outputs = [*inputs, optional], [*specs, out_block], [*outputs, (out_block, cotangent)]
    width = layout.step_heads * layout.value_dim
    taps_gradient = jax.ShapeDtypeStruct((q.shape[0], *taps.shape), jnp.float32)
    outputs.append((pl.BlockSpec((1, taps.shape[0], width), lambda b, h: (b, 0, h)), taps_gradient))
    dq, dk, dv, *d_optional, d_taps = pl.pallas_call(
        functools.partial(
            _backward_kernel, layout=layout, has_own=own is not None, has_auxiliary=auxiliary is not None
        ),
        grid=(q.shape[0], layout.steps),
        in_specs=specs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        scratch_shapes=[_padded(layout, q.shape[1])] * 2,
        compiler_params=_parameters(layout, q, k),
        interpret=interpret,
        name="linear_angular_backward",
    )(*inputs)
    d_own, d_auxiliary = (d_optional.pop(0) if x is not None else None for x in (own, auxiliary))
    return dq, dk, dv, d_own, d_taps.sum(0), d_auxiliary


_attention.defvjp(_forward, _backward)


def arrange_heads(q, k, v, blocks: int) -> Heads:
    """How the heads of q, k and v, [batch, tokens, heads, dim], are worked on by a kernel with so many blocks."""
    size = block_bytes(q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype.itemsize) * blocks // 5
    return arrange(q.shape[2], q.shape[3], v.shape[3], bytes_per_head=size)


def _arrange(q, k, v, heads, blocks):
    q, k, v = (jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[2] // heads), x.dtype) for x in (q, k, v))
    return arrange_heads(q, k, v, blocks)


def _parameters(layout, q, k):
    size = block_bytes(q.shape[1], k.shape[1], layout.key_dim, layout.value_dim, q.dtype.itemsize)
    return compiler_params("parallel", "parallel", block_bytes=layout.step_heads * size)


def _padded(layout: Heads, tokens: int):
    return pltpu.VMEM((tokens + 2 * PAD, _window(layout) * layout.value_dim), jnp.float32)


def _window(layout: Heads) -> int:
    """Heads that are worked on together."""
    return len(layout.windows(layout.key_dim, layout.value_dim)[0][0])


def _blocks(layout: Heads, q, k, taps):
    """Blocks of queries, keys, values, of the output, of the taps, and of the three constants."""
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim

    def of_tokens(x, width):
        return pl.BlockSpec((1, x.shape[1], width), lambda b, h: (b, 0, h))

    keys, values = _window(layout) * layout.key_dim, _window(layout) * layout.value_dim
    return (
        *(of_tokens(q, key_width), of_tokens(k, key_width), of_tokens(k, value_width), of_tokens(q, value_width)),
        pl.BlockSpec((taps.shape[0], value_width), lambda b, h: (0, h)),
        *(pl.BlockSpec(shape, lambda b, h: (0, 0)) for shape in ((keys, keys), (values, values), (keys, values))),
    )


def head_sums(layout: Heads, heads: int, dtype: jnp.dtype):
    """Zeros and ones that say which lanes are of one of so many heads: keys and keys, values and values, both."""
    key_dim, value_dim = layout.key_dim, layout.value_dim
    sizes = ((key_dim, key_dim), (value_dim, value_dim), (key_dim, value_dim))
    return [same_head(heads, rows, columns, dtype) for rows, columns in sizes]


def _sums_of(keys: slice, values: slice, keys_ref, values_ref, cross_ref):
    """`head_sums` of a window's size, the cross one over pi: the last window may have fewer heads."""
    key_lanes, value_lanes = slice(keys.stop - keys.start), slice(values.stop - values.start)
    cross = cross_ref[key_lanes, value_lanes].astype(jnp.float32) / math.pi
    return keys_ref[key_lanes, key_lanes], values_ref[value_lanes, value_lanes], cross


def inverse_norms(dot, x, sums):
    """1 / |x| of each head, in all of its lanes; `sums` is `same_head`."""
    return jax.lax.rsqrt(dot(x * x, sums, NN) + SQUARED_NORM_EPSILON)


def through_norm(dot, d_normal, normal, inverse, sums):
    """The gradient of x from that of x / |x|."""
    return inverse * (d_normal - normal * dot(d_normal * normal, sums, NN))


def shifted(padded_ref, rows, taps, leading=None, trailing=None):
    """The rows as the taps see them, one tap after the other: by -taps // 2 ... taps // 2 tokens.

    Beyond the ends there is `leading` and `trailing`, PAD rows each, or zeros.
    """
    tokens, width = rows.shape
    zeros = jnp.zeros((PAD, width), jnp.float32)
    padded_ref[:PAD, :width] = zeros if leading is None else leading
    padded_ref[PAD + tokens :, :width] = zeros if trailing is None else trailing
    padded_ref[PAD : PAD + tokens, :width] = rows
    for tap in range(taps):
        yield padded_ref[pl.ds(PAD - taps // 2 + tap, tokens), :width]


def _forward_kernel(
    q_ref, k_ref, v_ref, taps_ref, keys_ref, values_ref, cross_ref, *rest, layout, has_own, has_auxiliary
):
    *optional_refs, out_ref, padded_ref = rest
    own_ref = optional_refs[0] if has_own else v_ref
    dot = product(q_ref.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        key_sums, value_sums, cross = _sums_of(keys, values, keys_ref, values_ref, cross_ref)
        q, k, v = q_ref[0, :, keys], k_ref[0, :, keys], v_ref[0, :, values]
        wide_q, wide_k, own = (x.astype(jnp.float32) for x in (q, k, own_ref[0, :, values]))
        normal_k = wide_k * inverse_norms(dot, wide_k, key_sums)
        key_values = dot(normal_k, v, TN) * cross
        normal_q = wide_q * inverse_norms(dot, wide_q, key_sums)
        core = 0.5 * own + dot(normal_q, key_values, NN)
        if has_auxiliary:
            core += optional_refs[-1][0, :, values].astype(jnp.float32)
        out = core * inverse_norms(dot, core, value_sums)
        for tap, window in enumerate(shifted(padded_ref, own, taps_ref.shape[0])):
            out += window * taps_ref[tap : tap + 1, values]
        out_ref[0, :, values] = out.astype(out_ref.dtype)


def _backward_kernel(
    q_ref, k_ref, v_ref, taps_ref, keys_ref, values_ref, cross_ref, cotangent_ref, *rest, layout, has_own, has_auxiliary
):
    count = has_own + has_auxiliary
    optional_refs, (dq_ref, dk_ref, dv_ref, *d_optional_refs) = rest[:count], rest[count:-3]
    d_taps_ref, padded_ref, padded_cotangent_ref = rest[-3:]
    own_ref = optional_refs[0] if has_own else v_ref
    dot = product(q_ref.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        key_sums, value_sums, cross = _sums_of(keys, values, keys_ref, values_ref, cross_ref)
        wide_q, wide_k = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32)
        wide_v, cotangent = v_ref[0, :, values].astype(jnp.float32), cotangent_ref[0, :, values].astype(jnp.float32)
        own = own_ref[0, :, values].astype(jnp.float32)
        # The forward pass again: only its inputs were kept.
        inverse_k, inverse_q = inverse_norms(dot, wide_k, key_sums), inverse_norms(dot, wide_q, key_sums)
        normal_k, normal_q = wide_k * inverse_k, wide_q * inverse_q
        key_values = dot(normal_k, wide_v, TN) * cross
        core = 0.5 * own + dot(normal_q, key_values, NN)
        if has_auxiliary:
            core += optional_refs[-1][0, :, values].astype(jnp.float32)
        inverse_core = inverse_norms(dot, core, value_sums)
        d_core = through_norm(dot, cotangent, core * inverse_core, inverse_core, value_sums)
        if has_auxiliary:
            d_optional_refs[-1][0, :, values] = d_core.astype(dv_ref.dtype)
        d_key_values = dot(normal_q, d_core, TN) * cross
        dv = dot(normal_k, d_key_values, NN)
        dq = through_norm(dot, dot(d_core, key_values, NT), normal_q, inverse_q, key_sums)
        dk = through_norm(dot, dot(wide_v, d_key_values, NT), normal_k, inverse_k, key_sums)
        d_own = 0.5 * d_core
        # The convolution's transpose has the taps in the other order.
        taps = taps_ref.shape[0]
        for tap, window in enumerate(shifted(padded_cotangent_ref, cotangent, taps)):
            d_own += window * taps_ref[taps - 1 - tap : taps - tap, values]
        for tap, window in enumerate(shifted(padded_ref, own, taps)):
            d_taps_ref[0, tap : tap + 1, values] = jnp.sum(window * cotangent, axis=0, keepdims=True)
        dq_ref[0, :, keys] = dq.astype(dq_ref.dtype)
        dk_ref[0, :, keys] = dk.astype(dk_ref.dtype)
        if has_own:
            d_optional_refs[0][0, :, values] = d_own.astype(dv_ref.dtype)
        else:
            dv += d_own
        dv_ref[0, :, values] = dv.astype(dv_ref.dtype)
