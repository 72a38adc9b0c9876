"""The masked softmax branch in one kernel each way, with no array of queries x keys in HBM.

The normaliser has to be known before a weight can be compared with the threshold. A block of queries meets all keys in
fast memory, so that its scores are computed once and both passes over them, the normaliser's and the mask's, stay
there. The backward kernel computes them again, from each row's kept maximum and normaliser, with keys along the rows:
then only the queries' gradient needs a transposed product. With D = rowsum(P M dP) = rowsum(dO O),
dS = P (M dP - D), for the mask passes no gradient of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.layout import LANES, NN, NT, TN, Heads, arrange, compiler_params, lanes_of_head, product

QUERY_BLOCK = 128
MAX_SINGLE_BLOCK = 256  # so many queries are one block
MAX_SCORE_BYTES = 4 * 2**20  # of a block's scores


def query_block(queries: int) -> int:
    """How many queries are worked on together: all, if they are few."""
    return queries if queries <= MAX_SINGLE_BLOCK else QUERY_BLOCK


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """What one head takes of the backward kernel's blocks and of its float32 sums."""
    return (keys * 2 + 3 * query_block(queries)) * (key_dim + value_dim) * itemsize + 4 * keys * (key_dim + value_dim)


def score_bytes(queries: int, keys: int) -> int:
    """What one block of queries' scores take."""
    return 4 * query_block(queries) * keys


def masked_softmax(q, k, v, threshold, bias, *, scale: float, interpret: bool):
    """((M P) V, weights kept), differentiable; q, k and v as the public operation takes them.

    Args:
      q: [batch, queries, heads, key_dim].
      k: [batch, keys, heads, key_dim].
      v: [batch, keys, heads, value_dim].
      threshold: a scalar.
      bias: dense [1 or batch, heads, queries, keys], or None.
      scale: of the products of queries and keys.
      interpret: run as plain JAX, on any platform.

    Returns:
      The branch's output, like v at the queries, and how many weights were kept, a float32 scalar.
    """
    batch, queries, heads, _ = q.shape
    flat = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (batch, *bias.shape[1:])) if bias.shape[0] != batch else bias
    limits = jnp.asarray(threshold, jnp.float32).reshape(1, 1)
    out, kept = _attention(*flat, limits, bias, heads, scale, interpret)
    return out.reshape(batch, queries, heads, v.shape[3]), kept.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, threshold, bias, heads, scale, interpret):
    return _forward(q, k, v, threshold, bias, heads, scale, interpret)[0]


def _arrange(q, k, v, heads, bias) -> tuple[Heads, int]:
    key_dim, value_dim = q.shape[2] // heads, v.shape[2] // heads
    size = block_bytes(q.shape[1], k.shape[1], key_dim, value_dim, q.dtype.itemsize)
    if bias is not None:
        size += 2 * score_bytes(q.shape[1], k.shape[1])
    layout = arrange(heads, key_dim, value_dim, bytes_per_head=size)
    return layout, layout.step_heads * size + score_bytes(q.shape[1], k.shape[1])


def _blocks(layout: Heads, block: int, keys: int):
    """Blocks of queries of key_dim and of value_dim, keys, values, of a number a head and query, and of the bias."""
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim
    return (
        pl.BlockSpec((1, block, key_width), lambda b, h, i: (b, i, h)),
        pl.BlockSpec((1, block, value_width), lambda b, h, i: (b, i, h)),
        pl.BlockSpec((1, keys, key_width), lambda b, h, i: (b, 0, h)),
        pl.BlockSpec((1, keys, value_width), lambda b, h, i: (b, 0, h)),
        pl.BlockSpec((1, 1, layout.step_heads, block), lambda b, h, i: (b, h, 0, i)),
        pl.BlockSpec((1, layout.step_heads, block, keys), lambda b, h, i: (b, h, i, 0)),
    )


def _forward(q, k, v, threshold, bias, heads, scale, interpret):
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    count = pl.cdiv(queries, block)
    q_block, out_block, k_block, v_block, row_block, bias_block = _blocks(layout, block, keys)
    inputs, specs = [threshold, q, k, v], [pl.BlockSpec(memory_space=pltpu.SMEM), q_block, k_block, v_block]
    if bias is not None:
        inputs, specs = [*inputs, bias], [*specs, bias_block]
    out, largest, inverse, kept = pl.pallas_call(
        functools.partial(
            _forward_kernel, layout=layout, scale=scale, queries=queries, block=block, has_bias=bias is not None
        ),
        grid=(batch, layout.steps, count),
        in_specs=specs,
        out_specs=[out_block, row_block, row_block, pl.BlockSpec((1, 1, 1, 1, LANES), lambda b, h, i: (b, h, i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, v.shape[2]), v.dtype),
            *[jax.ShapeDtypeStruct((batch, layout.steps, layout.step_heads, queries), jnp.float32)] * 2,
            jax.ShapeDtypeStruct((batch, layout.steps, count, 1, LANES), jnp.float32),
        ],
        compiler_params=compiler_params("parallel", "parallel", "parallel", block_bytes=size),
        interpret=interpret,
        name="masked_softmax_forward",
    )(*inputs)
    return (out, kept[..., 0]), (q, k, v, threshold, bias, out, largest, inverse)


def _backward(heads, scale, interpret, residuals, cotangents):
    q, k, v, threshold, bias, out, largest, inverse = residuals
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    q_block, out_block, k_block, v_block, row_block, bias_block = _blocks(layout, block, keys)
    inputs = [threshold, q, k, v, cotangents[0], out, largest, inverse]
    specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        q_block,
        k_block,
        v_block,
        out_block,
        out_block,
        row_block,
        row_block,
    ]
    outputs = [(q_block, q), (k_block, k), (v_block, v)]
    if bias is not None:
        inputs, specs, outputs = [*inputs, bias], [*specs, bias_block], [*outputs, (bias_block, bias)]
    sums = [pltpu.VMEM((keys, layout.step_heads * dim), jnp.float32) for dim in (layout.key_dim, layout.value_dim)]
    gradients = pl.pallas_call(
        functools.partial(
            _backward_kernel, layout=layout, scale=scale, queries=queries, block=block, has_bias=bias is not None
        ),
        grid=(batch, layout.steps, pl.cdiv(queries, block)),
        in_specs=specs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
        scratch_shapes=sums,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary", block_bytes=size),
        interpret=interpret,
        name="masked_softmax_backward",
    )(*inputs)
    dq, dk, dv, *d_bias = gradients
    return dq, dk, dv, jnp.zeros_like(threshold), (d_bias[0] if d_bias else None)


_attention.defvjp(_forward, _backward)


def _as_row(column: jax.Array) -> jax.Array:
    """[rows, 1] as [1, rows]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


def _forward_kernel(threshold_ref, q_ref, k_ref, v_ref, *rest, layout, scale, queries, block, has_bias):
    *bias_ref, out_ref, largest_ref, inverse_ref, kept_ref = rest
    dot = product(q_ref.dtype)
    threshold = threshold_ref[0, 0]
    # Rounding can lift a weight above 1, so an empty mask has to be said rather than computed.
    threshold = jnp.where(threshold >= 1, jnp.inf, threshold)
    # The last block may reach beyond the queries: what is there is not counted.
    valid = pl.program_id(2) * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < queries
    kept = jnp.zeros((1, 1), jnp.float32)
    for group in range(layout.step):
        key_lanes, value_lanes = layout.key_lanes(group), layout.value_lanes(group)
        q, k, v = q_ref[0, :, key_lanes].astype(jnp.float32) * scale, k_ref[0, :, key_lanes], v_ref[0, :, value_lanes]
        out = jnp.zeros((block, v.shape[1]), jnp.float32)
        for member in range(layout.group):
            head = group * layout.group + member
            of_head = jnp.where(lanes_of_head(member, layout.key_dim, q.shape), q, 0)
            scores = dot(of_head, k, NT)
            if has_bias:
                scores += bias_ref[0][0, head].astype(jnp.float32)
            largest = jnp.max(scores, axis=1, keepdims=True)
            weights = jnp.exp(scores - largest)
            inverse = 1 / jnp.sum(weights, axis=1, keepdims=True)
            weights = weights * inverse
            keep = weights > threshold
            kept_here = jnp.sum(jnp.where(keep, 1.0, 0.0), axis=1, keepdims=True)
            kept += jnp.sum(jnp.where(valid, kept_here, 0), axis=0, keepdims=True)
            attended = dot(jnp.where(keep, weights, 0), v, NN)
            out = jnp.where(lanes_of_head(member, layout.value_dim, out.shape), attended, out)
            largest_ref[0, 0, head : head + 1, :] = _as_row(largest)
            inverse_ref[0, 0, head : head + 1, :] = _as_row(inverse)
        out_ref[0, :, value_lanes] = out.astype(out_ref.dtype)
    kept_ref[0, 0, 0] = jnp.broadcast_to(kept, (1, LANES))


def _backward_kernel(
    threshold_ref,
    q_ref,
    k_ref,
    v_ref,
    cotangent_ref,
    out_ref,
    largest_ref,
    inverse_ref,
    *rest,
    layout,
    scale,
    queries,
    block,
    has_bias,
):
    *bias_refs, dk_sum_ref, dv_sum_ref = rest
    bias_ref, dq_ref, dk_ref, dv_ref, d_bias_ref = bias_refs if has_bias else (None, *bias_refs, None)
    dot = product(q_ref.dtype)
    threshold = threshold_ref[0, 0]
    threshold = jnp.where(threshold >= 1, jnp.inf, threshold)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    # What lies beyond the queries may be anything, NaN too: it is made zero, so that it adds nothing to the sums.
    valid = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < queries
    valid_row = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < queries
    for group in range(layout.step):
        key_lanes, value_lanes = layout.key_lanes(group), layout.value_lanes(group)
        k, v = k_ref[0, :, key_lanes], v_ref[0, :, value_lanes]
        q = jnp.where(valid, q_ref[0, :, key_lanes].astype(jnp.float32) * scale, 0)
        cotangent = jnp.where(valid, cotangent_ref[0, :, value_lanes].astype(jnp.float32), 0)
        out = jnp.where(valid, out_ref[0, :, value_lanes].astype(jnp.float32), 0)
        dq = jnp.zeros(q.shape, jnp.float32)
        for member in range(layout.group):
            head = group * layout.group + member
            of_head = jnp.where(lanes_of_head(member, layout.key_dim, q.shape), q, 0)
            cotangent_of_head = jnp.where(lanes_of_head(member, layout.value_dim, out.shape), cotangent, 0)
            scores = dot(k, of_head, NT)  # [keys, queries]
            if has_bias:
                scores += jnp.transpose(jnp.where(valid, bias_ref[0, head].astype(jnp.float32), 0))
            largest = jnp.where(valid_row, largest_ref[0, 0, head : head + 1, :], 0)
            inverse = jnp.where(valid_row, inverse_ref[0, 0, head : head + 1, :], 0)
            # As in the forward pass, operation by operation: a weight on the threshold is masked in both or in none.
            weights = jnp.exp(scores - largest) * inverse
            masked = jnp.where(weights > threshold, weights, 0)
            projection = _as_row(jnp.sum(cotangent_of_head * out, axis=1, keepdims=True))
            d_scores = masked * dot(v, cotangent_of_head, NT) - weights * projection
            dv_sum_ref[:, value_lanes] += dot(masked, cotangent_of_head, NN)
            dk_sum_ref[:, key_lanes] += dot(d_scores, of_head, NN)
            dq = jnp.where(lanes_of_head(member, layout.key_dim, q.shape), dot(d_scores, k, TN), dq)
            if has_bias:
                d_bias_ref[0, head] = jnp.transpose(d_scores).astype(d_bias_ref.dtype)
        dq_ref[0, :, key_lanes] = (dq * scale).astype(dq_ref.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)
