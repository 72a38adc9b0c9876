"""The masked softmax branch in one kernel each way, with no array of queries x keys in HBM.

The normaliser has to be known before a weight can be compared with the threshold. A block of queries meets all keys in
fast memory, so that its scores are computed once and both passes over them, the normaliser's and the mask's, stay
there. The backward kernel computes them again, from each row's kept maximum and normaliser. With
D = rowsum(P M dP) = rowsum(dO O), dS = P (M dP - D), for the mask passes no gradient of its own.

Scores lie [keys, queries]: sums over keys are then sums of registers, what is one number a query is a row, and no
array of queries x keys is ever transposed. Where nothing passes the threshold, the products with the values and the
whole backward pass are skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.factors import factor_bytes, factor_inputs, factor_lanes
from castling_jax.ops.tpu.layout import (
    LANES,
    NN,
    NT,
    TN,
    Heads,
    arrange,
    compiler_params,
    lanes_of_head,
    product,
    rows_of_head,
    traced_once,
)

QUERY_BLOCK = 128
KEY_CHUNK = 256  # keys whose scores are worked on together: about as many as the registers hold
MAX_SINGLE_BLOCK = 256  # so many queries are one block


def query_block(queries: int) -> int:
    """How many queries are worked on together: all, if they are few."""
    return queries if queries <= MAX_SINGLE_BLOCK else QUERY_BLOCK


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """What one head takes of the backward kernel's blocks and of its float32 sums."""
    return (keys * 3 + 3 * query_block(queries)) * (key_dim + value_dim) * itemsize + 4 * keys * (key_dim + value_dim)


def score_bytes(queries: int, keys: int) -> int:
    """What one block of queries' scores take."""
    return 4 * query_block(queries) * keys


def needed_bytes(q, k, v, bias, factors) -> int:
    """What the backward kernel needs of the fast memory at the least, for one group of heads.

    Its blocks in two buffers each, float32 sums of two, some six arrays of scores, and a group's masked weights; of a
    bias in factors its blocks and the marks.
    """
    layout = arrange(q.shape[2], q.shape[3], v.shape[3], bytes_per_head=1)
    size = block_bytes(q.shape[1], k.shape[1], layout.key_dim, layout.value_dim, q.dtype.itemsize)
    scores = score_bytes(q.shape[1], k.shape[1])
    needed = layout.group * (2 * size + scores * (1 if bias is None else 4)) + 6 * scores
    if factors is not None:
        block = query_block(q.shape[1])
        needed += factor_bytes(factors, q.shape[2], group=layout.group, block=block, keys=k.shape[1])
    return needed


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def masked_softmax(q, k, v, threshold, bias, factors, heads, scale, interpret, hand_on, sides):
    """((M P) V, weights kept, what is handed on), differentiable.

    Args:
      q: [batch, queries, heads * key_dim].
      k: [batch, keys, heads * key_dim].
      v: [batch, keys, heads * value_dim].
      threshold: [1, 1], float32.
      bias: dense and transposed, [1 or batch, heads, keys, queries], or None.
      factors: in place of `bias`, `join_factors` of one that is the sum of one for the keys' row and one for their
        column; or None.
      heads: how many.
      scale: of the products of queries and keys.
      interpret: run as plain JAX, on any platform.
      hand_on: that q, k and v are returned too. Whoever goes on with these has the gradients that come back by them
        added in the backward kernel, and not in a pass over memory.
      sides: (rows, columns) of the keys' grid, where there are factors.

    Returns:
      The branch's output, like v at the queries; how many weights each block kept, float32; what is handed on.
    """
    return _forward(q, k, v, threshold, bias, factors, heads, scale, interpret, hand_on, sides)[0]


def _arrange(q, k, v, heads, bias) -> tuple[Heads, int]:
    key_dim, value_dim = q.shape[2] // heads, v.shape[2] // heads
    size = block_bytes(q.shape[1], k.shape[1], key_dim, value_dim, q.dtype.itemsize)
    if bias is not None:
        size += 2 * score_bytes(q.shape[1], k.shape[1])
    layout = arrange(heads, key_dim, value_dim, bytes_per_head=size)
    return layout, layout.step_heads * size + score_bytes(q.shape[1], k.shape[1])


# The grid is [steps along the heads, batch, blocks of queries]: a bias that is one for the whole batch is read once a
# step, and where there is one block of queries its gradient is summed over the batch in fast memory.


def _blocks(layout: Heads, block: int, keys: int):
    """Blocks of queries of key_dim and of value_dim, keys, values, of a number a head and query, of one a head."""
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim
    return (
        pl.BlockSpec((1, block, key_width), lambda h, b, i: (b, i, h)),
        pl.BlockSpec((1, block, value_width), lambda h, b, i: (b, i, h)),
        pl.BlockSpec((1, keys, key_width), lambda h, b, i: (b, 0, h)),
        pl.BlockSpec((1, keys, value_width), lambda h, b, i: (b, 0, h)),
        pl.BlockSpec((1, 1, layout.step_heads, block), lambda h, b, i: (b, h, 0, i)),
        pl.BlockSpec((1, 1, 1, 1, LANES), lambda h, b, i: (b, h, i, 0, 0)),
    )


def _bias_block(layout: Heads, block: int, keys: int, shared: bool):
    shape = (1, layout.step_heads, keys, block)
    return pl.BlockSpec(shape, lambda h, b, i: (0 if shared else b, h, 0, i))


@traced_once("heads", "scale", "interpret", "hand_on", "sides")
def _forward(q, k, v, threshold, bias, factors, heads, scale, interpret, hand_on, sides):
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    count = pl.cdiv(queries, block)
    q_block, out_block, k_block, v_block, row_block, kept_block = _blocks(layout, block, keys)
    inputs, specs = [threshold, q, k, v], [pl.BlockSpec(memory_space=pltpu.SMEM), q_block, k_block, v_block]
    if bias is not None:
        inputs, specs = [*inputs, bias], [*specs, _bias_block(layout, block, keys, bias.shape[0] == 1)]
    if factors is not None:
        more, more_specs = factor_inputs(layout, block, factors, sides)
        inputs, specs = [*inputs, *more], [*specs, *more_specs]
    out, largest, inverse, kept = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            layout=layout,
            scale=scale,
            queries=queries,
            block=block,
            has_bias=bias is not None,
            has_factors=factors is not None,
        ),
        grid=(layout.steps, batch, count),
        in_specs=specs,
        out_specs=[out_block, row_block, row_block, kept_block],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, v.shape[2]), v.dtype),
            *[jax.ShapeDtypeStruct((batch, layout.steps, layout.step_heads, queries), jnp.float32)] * 2,
            jax.ShapeDtypeStruct((batch, layout.steps, count, 1, LANES), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((layout.step_heads, keys, block), q.dtype),
        ],
        compiler_params=compiler_params("parallel", "parallel", "parallel", block_bytes=size),
        interpret=interpret,
        name="masked_softmax_forward",
    )(*inputs)
    on = (q, k, v) if hand_on else ()
    return (out, kept[..., 0], *on), (q, k, v, threshold, bias, factors, out, largest, inverse, kept)


@traced_once("heads", "scale", "interpret", "hand_on", "sides")
def _backward(heads, scale, interpret, hand_on, sides, residuals, cotangents):
    q, k, v, threshold, bias, factors, out, largest, inverse, kept = residuals
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    count = pl.cdiv(queries, block)
    q_block, out_block, k_block, v_block, row_block, kept_block = _blocks(layout, block, keys)
    d_out, _, *d_on = cotangents
    outputs = [(q_block, q), (k_block, k), (v_block, v)]
    inputs = [threshold, q, k, v, d_out, out, largest, inverse, kept]
    aliases = {len(inputs) + place: place for place in range(len(d_on))}
    inputs += d_on
    specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        *(q_block, k_block, v_block, out_block, out_block, row_block, row_block, kept_block),
        *(block for block, _ in outputs[: len(d_on)]),
    ]
    summed = bias is not None and bias.shape[0] == 1 and count == 1
    if bias is not None:
        inputs, specs = [*inputs, bias], [*specs, _bias_block(layout, block, keys, bias.shape[0] == 1)]
        of_bias = jax.ShapeDtypeStruct((1 if summed else batch, *bias.shape[1:]), jnp.float32)
        outputs.append((_bias_block(layout, block, keys, summed), of_bias))
    if factors is not None:
        more, more_specs = factor_inputs(layout, block, factors, sides)
        inputs, specs = [*inputs, *more], [*specs, *more_specs]
        outputs.append((more_specs[0], more[0]))
    sums = [pltpu.VMEM((keys, layout.step_heads * dim), jnp.float32) for dim in (layout.key_dim, layout.value_dim)]
    gradients = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            layout=layout,
            scale=scale,
            queries=queries,
            block=block,
            hand_on=hand_on,
            has_bias=bias is not None,
            has_factors=factors is not None,
            summed=summed,
        ),
        grid=(layout.steps, batch, count),
        in_specs=specs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        scratch_shapes=sums,
        input_output_aliases=aliases,
        compiler_params=compiler_params(
            "parallel", "arbitrary" if summed else "parallel", "arbitrary", block_bytes=size
        ),
        interpret=interpret,
        name="masked_softmax_backward",
    )(*inputs)
    dq, dk, dv, *more = gradients
    d_bias: jax.Array | None = None
    d_factors: jax.Array | None = None
    if bias is not None:
        of_each = more.pop(0)
        d_bias = (of_each if of_each.shape == bias.shape else of_each.sum(0, keepdims=True)).astype(bias.dtype)
    if factors is not None:
        d_factors = jnp.moveaxis(more.pop(0), 0, 2).reshape(factors.shape)
    return dq, dk, dv, jnp.zeros_like(threshold), d_bias, d_factors


masked_softmax.defvjp(_forward, _backward)


def of_head(x: jax.Array, member: int, dim: int) -> jax.Array:
    """[tokens, lanes of a group] with zeros in the lanes of all heads but one."""
    return jnp.where(lanes_of_head(member, dim, x.shape), x, 0)


def is_kept(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Whether a weight passes the mask. Written so that NaN does, and is seen."""
    return ~(weights <= threshold)


def d_scores_of(dot, weights, masked, v, cotangent, out):
    """The scores' gradient, [keys, queries]: P (M dP - D), with D = rowsum(dO O) as a row.

    `cotangent` is zero in the lanes of other heads, which takes them out of the values' and the output's part.
    """
    column = jnp.sum(cotangent * out, axis=1, keepdims=True)
    projection = jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]
    return masked * dot(v, cotangent, NT) - weights * projection


def _forward_kernel(threshold_ref, q_ref, k_ref, v_ref, *rest, layout, scale, queries, block, has_bias, has_factors):
    *optional_refs, out_ref, largest_ref, inverse_ref, kept_ref, masked_ref = rest
    bias_ref: Any = optional_refs.pop(0) if has_bias else None
    dot = product(q_ref.dtype)
    threshold = threshold_ref[0, 0]
    # The last block may reach beyond the queries: what is there is not counted.
    valid = pl.program_id(2) * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < queries
    keys = k_ref.shape[1]
    chunks = [slice(start, min(start + KEY_CHUNK, keys)) for start in range(0, keys, KEY_CHUNK)]
    kept = jnp.zeros((1, block), jnp.float32)
    for heads, [lanes] in layout.windows(layout.key_dim):
        q = q_ref[0, :, lanes].astype(jnp.float32) * scale
        for member, head in enumerate(heads):
            query = of_head(q, member, layout.key_dim)
            parts = [dot(k_ref[0, chunk, lanes], query, NT) for chunk in chunks]  # [keys, queries]
            if has_bias:
                parts = [
                    part + bias_ref[0, head, chunk].astype(jnp.float32)
                    for part, chunk in zip(parts, chunks, strict=True)
                ]
            if has_factors:
                factors_ref, marks_ref = optional_refs
                of_factors, marks = factor_lanes(head, factors_ref, marks_ref)
                factors = factors_ref[0, 0, :, of_factors]
                parts = [part + dot(marks[chunk], factors, NT) for part, chunk in zip(parts, chunks, strict=True)]
            largest = functools.reduce(jnp.maximum, [jnp.max(part, axis=0, keepdims=True) for part in parts])
            parts = [jnp.exp(part - largest) for part in parts]
            inverse = 1 / sum(jnp.sum(part, axis=0, keepdims=True) for part in parts)
            for part, chunk in zip(parts, chunks, strict=True):
                weights = part * inverse
                keep = is_kept(weights, threshold)
                masked_ref[head, chunk] = jnp.where(keep, weights, 0).astype(masked_ref.dtype)
                kept += jnp.sum(keep.astype(jnp.float32), axis=0, keepdims=True)
            largest_ref[0, 0, head : head + 1, :] = largest
            inverse_ref[0, 0, head : head + 1, :] = inverse
    total = jnp.sum(jnp.where(valid, kept, 0), axis=1, keepdims=True)
    # Rounding can lift a weight above 1, so an empty mask has to be said rather than computed.
    total = jnp.where(threshold < 1, total, 0)
    kept_ref[0, 0, 0] = jnp.broadcast_to(total, (1, LANES))
    any_kept = jnp.max(total) > 0

    @pl.when(any_kept)
    def _():
        for heads, [lanes] in layout.windows(layout.value_dim):
            out = jnp.zeros((lanes.stop - lanes.start, block), jnp.float32)
            for member, head in enumerate(heads):
                attended = dot(v_ref[0, :, lanes], masked_ref[head], TN)
                out = jnp.where(rows_of_head(member, layout.value_dim, out.shape), attended, out)
            out_ref[0, :, lanes] = jnp.transpose(out).astype(out_ref.dtype)

    @pl.when(~any_kept)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)


def _set_to_zero(ref) -> None:
    ref[...] = jnp.zeros_like(ref)


def _start(sum_ref, added_ref) -> None:
    """Starts a sum from one image's block, or from zero."""
    sum_ref[...] = jnp.zeros_like(sum_ref) if added_ref is None else added_ref[0].astype(sum_ref.dtype)


def _backward_kernel(*refs, layout, scale, queries, block, hand_on, has_bias, has_factors, summed):
    threshold_ref, q_ref, k_ref, v_ref, cotangent_ref, out_ref, largest_ref, inverse_ref, kept_ref, *rest = refs
    added_q, added_k, added_v = (rest.pop(0) if hand_on else None for _ in range(3))
    bias_ref: Any = rest.pop(0) if has_bias else None
    factors_ref: Any = rest.pop(0) if has_factors else None
    marks_ref = rest.pop(0) if has_factors else None
    dq_ref, dk_ref, dv_ref, *d_bias_refs, dk_sum_ref, dv_sum_ref = rest
    d_bias_ref: Any = d_bias_refs.pop(0) if has_bias else None
    d_factors_ref: Any = d_bias_refs.pop(0) if has_factors else None
    dot = product(q_ref.dtype)
    threshold = threshold_ref[0, 0]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        _start(dk_sum_ref, added_k)
        _start(dv_sum_ref, added_v)

    if has_bias:
        pl.when((pl.program_id(1) == 0) | (not summed))(functools.partial(_set_to_zero, d_bias_ref))

    @pl.when(jnp.max(kept_ref[0, 0, 0]) > 0)
    def _():
        # What lies beyond the queries may be anything, NaN too: it is made zero, so that it adds nothing to the sums.
        valid = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < queries
        valid_row = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < queries
        values = [
            (
                heads,
                lanes,
                v_ref[0, :, lanes],
                jnp.where(valid, cotangent_ref[0, :, lanes].astype(jnp.float32), 0),
                jnp.where(valid, out_ref[0, :, lanes].astype(jnp.float32), 0),
            )
            for heads, [lanes] in layout.windows(layout.value_dim)
        ]
        d_factors: dict[int, tuple[slice, jax.Array]] = {}
        for heads, [key_lanes] in layout.windows(layout.key_dim):
            k = k_ref[0, :, key_lanes]
            q = jnp.where(valid, q_ref[0, :, key_lanes].astype(jnp.float32) * scale, 0)
            dq = jnp.zeros((q.shape[1], block), jnp.float32)
            for member, head in enumerate(heads):
                query = of_head(q, member, layout.key_dim)
                together, value_lanes, v, cotangent, out = next(window for window in values if head in window[0])
                d_out = of_head(cotangent, together.index(head), layout.value_dim)
                scores = dot(k, query, NT)  # [keys, queries]
                if has_bias:
                    scores += jnp.where(valid_row, bias_ref[0, head].astype(jnp.float32), 0)
                if has_factors:
                    of_factors, marks = factor_lanes(head, factors_ref, marks_ref)
                    scores += jnp.where(valid_row, dot(marks, factors_ref[0, 0, :, of_factors], NT), 0)
                largest = jnp.where(valid_row, largest_ref[0, 0, head : head + 1, :], 0)
                inverse = jnp.where(valid_row, inverse_ref[0, 0, head : head + 1, :], 0)
                # As in the forward pass, operation by operation: a weight on the threshold is masked in both or in
                # none.
                weights = jnp.exp(scores - largest) * inverse
                masked = jnp.where(is_kept(weights, threshold), weights, 0)
                d_scores = d_scores_of(dot, weights, masked, v, d_out, out)
                dv_sum_ref[:, value_lanes] += dot(masked, d_out, NN)
                dk_sum_ref[:, key_lanes] += dot(d_scores, query, NN)
                dq = jnp.where(rows_of_head(member, layout.key_dim, dq.shape), dot(k, d_scores, TN), dq)
                if has_bias:
                    d_bias_ref[0, head] += d_scores
                if has_factors:
                    # Each head's is zero in the lanes of others.
                    _, before = d_factors.get(of_factors.start, (None, 0))
                    d_factors[of_factors.start] = of_factors, before + dot(d_scores, marks, TN)
            dq = jnp.transpose(dq * scale)
            if added_q is not None:
                dq += added_q[0, :, key_lanes].astype(jnp.float32)
            dq_ref[0, :, key_lanes] = dq.astype(dq_ref.dtype)
        for lanes, d_factor in d_factors.values():
            d_factors_ref[0, 0, :, lanes] = d_factor.astype(d_factors_ref.dtype)

    # Where nothing was kept, no gradient comes back.
    @pl.when(jnp.max(kept_ref[0, 0, 0]) == 0)
    def _():
        dq_ref[...] = jnp.zeros_like(dq_ref) if added_q is None else added_q[...]
        if has_factors:
            _set_to_zero(d_factors_ref)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)
