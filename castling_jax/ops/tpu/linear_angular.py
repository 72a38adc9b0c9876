"""Linear-angular attention in one kernel, forward and backward: norms, products, output norm and token convolution.

Everything of one image and some heads is in fast memory at once, so that q, k, v and the output cross HBM once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from castling_jax.ops.norms import inverse_norms, inverse_norms_or_zero
from castling_jax.ops.tokens import selection
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
from castling_jax.ops.tpu.taps import Taps, arrange_taps, spread_taps


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """What one head takes of the forward kernel's blocks: q, k, v, own values, the auxiliary output and the output."""
    return itemsize * ((queries + keys) * key_dim + (3 * queries + keys) * value_dim)


def needed_bytes(q, k, v, taps, *, query_tokens, grid) -> int:
    """What the backward kernel needs of the fast memory at the least, for one group of heads.

    Nine blocks in two buffers each, some 12 arrays like them in float32, and what stays beside them.
    """
    heads = arrange_heads(q, k, v, blocks=9)
    tokens = max(q.shape[1], k.shape[1])
    blocks = heads.group * tokens * max(heads.key_dim, heads.value_dim) * (2 * 9 * q.dtype.itemsize + 12 * 4)
    return blocks + _staying_bytes(heads, q, k, arrange_taps(taps, grid), query_tokens)


def _staying_bytes(layout: Heads, q, k, places: Taps, chosen) -> int:
    """What stays in the fast memory: the padded copies of two arrays and, in two buffers, the selection of values."""
    copies = 2 * places.scratch_bytes(q.shape[1], _window(layout) * layout.value_dim)
    return copies + (0 if chosen is None else 2 * q.shape[1] * k.shape[1] * k.dtype.itemsize)


def linear_angular(
    q,
    k,
    v,
    own,
    taps,
    auxiliary,
    *,
    query_tokens: np.ndarray | None,
    grid: tuple[int, int] | None,
    interpret: bool,
):
    """l2normalise(auxiliary + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), differentiable; shapes as the public operation's.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      own: the values at the queries' positions, V outside of the products; None where `v` has them.
      taps: [taps, heads], [rows, columns, heads] with a grid, or None.
      auxiliary: what is added before the normalisation, like the output; or None.
      query_tokens: those of the keys' tokens that the queries stand on; None where it is all of them.
      grid: (height, width) of the queries, for taps in rows and columns.
      interpret: run as plain JAX, on any platform.
    """
    heads, value_dim = v.shape[2:]
    flat = [None if x is None else x.reshape(*x.shape[:2], -1) for x in (q, k, v, own, auxiliary)]
    places = arrange_taps(taps, grid)
    chosen = None if query_tokens is None else tuple(query_tokens.tolist())
    out = _attention(*flat[:4], spread_taps(taps, heads, value_dim), flat[4], heads, places, chosen, interpret)
    return out.reshape(*q.shape[:3], value_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, own, taps, auxiliary, heads, places, chosen, interpret):
    return _forward(q, k, v, own, taps, auxiliary, heads, places, chosen, interpret)[0]


@traced_once("heads", "places", "chosen", "interpret")
def _forward(q, k, v, own, taps, auxiliary, heads, places, chosen, interpret):
    layout = _arrange(q, k, v, heads, blocks=5)
    query_block, key_block, value_block, out_block, taps_block, *constants = _blocks(layout, q, k, taps)
    inputs = [q, k, v, taps, *head_sums(layout, _window(layout), q.dtype)]
    specs = [query_block, key_block, value_block, taps_block, *constants]
    more, more_specs = _selection_inputs(chosen, k)
    inputs, specs = [*inputs, *more], [*specs, *more_specs]
    for optional in (own, auxiliary):
        if optional is not None:
            inputs, specs = [*inputs, optional], [*specs, out_block]
    out = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            layout=layout,
            places=places,
            has_selection=chosen is not None,
            has_own=own is not None,
            has_auxiliary=auxiliary is not None,
        ),
        grid=(q.shape[0], layout.steps),
        in_specs=specs,
        out_specs=out_block,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), v.dtype),
        scratch_shapes=[places.scratch(q.shape[1], _window(layout) * layout.value_dim)],
        compiler_params=_parameters(layout, q, k, places, chosen),
        interpret=interpret,
        name="linear_angular_forward",
    )(*inputs)
    return out, (q, k, v, own, taps, auxiliary)


@traced_once("heads", "places", "chosen", "interpret")
def _backward(heads, places, chosen, interpret, residuals, cotangent):
    q, k, v, own, taps, auxiliary = residuals
    layout = _arrange(q, k, v, heads, blocks=9)
    query_block, key_block, value_block, out_block, taps_block, *constants = _blocks(layout, q, k, taps)
    inputs = [q, k, v, taps, *head_sums(layout, _window(layout), q.dtype), cotangent]
    specs = [query_block, key_block, value_block, taps_block, *constants, out_block]
    more, more_specs = _selection_inputs(chosen, k)
    inputs, specs = [*inputs, *more], [*specs, *more_specs]
    outputs = [(query_block, q), (key_block, k), (value_block, v)]
    for optional in (own, auxiliary):
        if optional is not None:
            inputs, specs, outputs = [*inputs, optional], [*specs, out_block], [*outputs, (out_block, cotangent)]
    width = layout.step_heads * layout.value_dim
    taps_gradient = jax.ShapeDtypeStruct((q.shape[0], *taps.shape), jnp.float32)
    outputs.append((pl.BlockSpec((1, taps.shape[0], width), lambda b, h: (b, 0, h)), taps_gradient))
    dq, dk, dv, *d_optional, d_taps = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            layout=layout,
            places=places,
            has_selection=chosen is not None,
            has_own=own is not None,
            has_auxiliary=auxiliary is not None,
        ),
        grid=(q.shape[0], layout.steps),
        in_specs=specs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        scratch_shapes=[places.scratch(q.shape[1], _window(layout) * layout.value_dim)] * 2,
        compiler_params=_parameters(layout, q, k, places, chosen),
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


def _parameters(layout, q, k, places, chosen):
    size = block_bytes(q.shape[1], k.shape[1], layout.key_dim, layout.value_dim, q.dtype.itemsize)
    staying = _staying_bytes(layout, q, k, places, chosen)
    return compiler_params("parallel", "parallel", block_bytes=layout.step_heads * size, staying_bytes=staying)


def _selection_inputs(chosen, k):
    """The matrix that selects the queries' values, if they are selected, and its block."""
    if chosen is None:
        return [], []
    return [selection(np.array(chosen), k.shape[1], k.dtype)], [
        pl.BlockSpec((len(chosen), k.shape[1]), lambda b, h: (0, 0))
    ]


def _window(layout: Heads) -> int:
    """Heads that are worked on together."""
    return len(layout.windows(layout.key_dim, layout.value_dim)[0][0])


def _blocks(layout: Heads, q, k, taps):
    """Blocks of queries, keys, values, of the output, of the taps, and of the three constants."""
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim

    def of_tokens(x, width):
        return pl.BlockSpec((1, x.shape[1], width), lambda b, h: (b, 0, h))

    return (
        *(of_tokens(q, key_width), of_tokens(k, key_width), of_tokens(k, value_width), of_tokens(q, value_width)),
        pl.BlockSpec((taps.shape[0], value_width), lambda b, h: (0, h)),
        *(pl.BlockSpec(x.shape, lambda b, h: (0, 0)) for x in head_sums(layout, _window(layout), q.dtype)),
    )


def head_sums(layout: Heads, heads: int, dtype: jnp.dtype):
    """Zeros and ones that say which lanes are of one head, three `same_head`.

    Of keys with keys and of values with values for the norms, as few heads as fill whole registers; of keys with values
    for the products of so many heads.
    """
    key_dim, value_dim = layout.key_dim, layout.value_dim
    keys, values = (min(heads, math.lcm(dim, LANES) // dim) for dim in (key_dim, value_dim))
    sizes = ((keys, key_dim, key_dim), (values, value_dim, value_dim), (heads, key_dim, value_dim))
    return [same_head(*size, dtype) for size in sizes]


def _cross_of(keys: slice, values: slice, cross_ref):
    """Which lanes of a window's keys and values are of one head, over pi: the last window may have fewer heads."""
    return cross_ref[: keys.stop - keys.start, : values.stop - values.start].astype(jnp.float32) / math.pi


def _sum_heads(dot, x, sums):
    """The sum over each head's lanes, in all of them; `sums` is `same_head` of some heads, and taken for as many."""
    parts = [x[:, start : start + len(sums)] for start in range(0, x.shape[1], len(sums))]
    return jnp.concatenate([dot(part, sums[: part.shape[1], : part.shape[1]], NN) for part in parts], axis=1)


def head_inverse_norms(dot, x, sums):
    """`inverse_norms` of each head, in all of its lanes; `sums` is the first or second of `head_sums`."""
    return inverse_norms(_sum_heads(dot, x * x, sums))


def head_inverse_norms_or_zero(dot, x, sums):
    """Likewise `inverse_norms_or_zero`, for the gradients, where the forward kernels need not pay for it."""
    return inverse_norms_or_zero(_sum_heads(dot, x * x, sums))


def through_norm(dot, d_normal, normal, inverse, sums):
    """The gradient of x from that of x / |x|."""
    return inverse * (d_normal - normal * _sum_heads(dot, d_normal * normal, sums))


def _own(dot, v, optional_refs, values: slice, has_selection: bool, has_own: bool):
    """The values at the queries' positions, of a window: of their own, some of v, or v."""
    if has_own:
        return optional_refs[0][0, :, values].astype(jnp.float32)
    return dot(optional_refs[0][...], v, NN) if has_selection else v.astype(jnp.float32)


def _forward_kernel(*refs, layout, places: Taps, has_selection, has_own, has_auxiliary):
    q_ref, k_ref, v_ref, taps_ref, keys_ref, values_ref, cross_ref, *optional_refs, out_ref, padded_ref = refs
    dot = product(q_ref.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        key_sums, value_sums, cross = keys_ref[...], values_ref[...], _cross_of(keys, values, cross_ref)
        q, k, v = q_ref[0, :, keys], k_ref[0, :, keys], v_ref[0, :, values]
        wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
        own = _own(dot, v, optional_refs, values, has_selection, has_own)
        normal_k = wide_k * head_inverse_norms(dot, wide_k, key_sums)
        key_values = dot(normal_k, v, TN) * cross
        normal_q = wide_q * head_inverse_norms(dot, wide_q, key_sums)
        core = 0.5 * own + dot(normal_q, key_values, NN)
        if has_auxiliary:
            core += optional_refs[-1][0, :, values].astype(jnp.float32)
        out = core * head_inverse_norms(dot, core, value_sums)
        for tap, window in enumerate(places.windows(padded_ref, own)):
            out += window * taps_ref[tap : tap + 1, values]
        out_ref[0, :, values] = out.astype(out_ref.dtype)


def _backward_kernel(*refs, layout, places: Taps, has_selection, has_own, has_auxiliary):
    q_ref, k_ref, v_ref, taps_ref, keys_ref, values_ref, cross_ref, cotangent_ref, *rest = refs
    count = has_selection + has_own + has_auxiliary
    optional_refs, (dq_ref, dk_ref, dv_ref, *d_optional_refs) = rest[:count], rest[count:-3]
    d_taps_ref, padded_ref, padded_cotangent_ref = rest[-3:]
    dot = product(q_ref.dtype)
    for _, [keys, values] in layout.windows(layout.key_dim, layout.value_dim):
        key_sums, value_sums, cross = keys_ref[...], values_ref[...], _cross_of(keys, values, cross_ref)
        wide_q, wide_k = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32)
        wide_v, cotangent = v_ref[0, :, values].astype(jnp.float32), cotangent_ref[0, :, values].astype(jnp.float32)
        own = _own(dot, wide_v, optional_refs, values, has_selection, has_own)
        # The forward pass again: only its inputs were kept.
        inverse_k, inverse_q = (head_inverse_norms_or_zero(dot, x, key_sums) for x in (wide_k, wide_q))
        normal_k, normal_q = wide_k * inverse_k, wide_q * inverse_q
        key_values = dot(normal_k, wide_v, TN) * cross
        core = 0.5 * own + dot(normal_q, key_values, NN)
        if has_auxiliary:
            core += optional_refs[-1][0, :, values].astype(jnp.float32)
        inverse_core = head_inverse_norms_or_zero(dot, core, value_sums)
        d_core = through_norm(dot, cotangent, core * inverse_core, inverse_core, value_sums)
        if has_auxiliary:
            d_optional_refs[-1][0, :, values] = d_core.astype(dv_ref.dtype)
        d_key_values = dot(normal_q, d_core, TN) * cross
        dv = dot(normal_k, d_key_values, NN)
        dq = through_norm(dot, dot(d_core, key_values, NT), normal_q, inverse_q, key_sums)
        dk = through_norm(dot, dot(wide_v, d_key_values, NT), normal_k, inverse_k, key_sums)
        d_own = 0.5 * d_core
        # The convolution's transpose has the taps in the other order.
        for tap, window in enumerate(places.windows(padded_cotangent_ref, cotangent)):
            d_own += window * taps_ref[places.count - 1 - tap : places.count - tap, values]
        for tap, window in enumerate(places.windows(padded_ref, own)):
            d_taps_ref[0, tap : tap + 1, values] = jnp.sum(window * cotangent, axis=0, keepdims=True)
        dq_ref[0, :, keys] = dq.astype(dq_ref.dtype)
        dk_ref[0, :, keys] = dk.astype(dk_ref.dtype)
        if has_own:
            d_optional_refs[0][0, :, values] = d_own.astype(dv_ref.dtype)
        else:
            dv += dot(optional_refs[0][...], d_own, TN) if has_selection else d_own
        dv_ref[0, :, values] = dv.astype(dv_ref.dtype)
