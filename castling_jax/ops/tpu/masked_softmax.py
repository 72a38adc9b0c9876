"""The masked softmax branch in one kernel forward and one backward, with no array of queries x keys in HBM.

A weight can be compared with the threshold only when its row's normaliser is known. A block of queries meets all keys
in fast memory, so scores are computed once and stay there for both passes over them, one for the normaliser and one for
the mask. The backward kernel computes the scores again, from the maximum and the normaliser that were kept of each row.
With D = rowsum(P M dP) = rowsum(dO O), dS = P (M dP - D), because the mask passes no gradient of its own.

Scores lie [keys, queries]. Sums over keys are then sums of registers, one number per query is a row, and no array of
queries x keys is ever transposed. Where no weight passes the threshold, the products with the values and the whole
backward pass are skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.call import Refs, call
from castling_jax.ops.tpu.channel_norms import norm_gradients, norm_inputs, norm_outputs, read, through_channel_norm
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

QUERY_BLOCK = 128  # the lanes of a register: scores lie [keys, queries]
KEY_CHUNK = 256  # keys whose scores are worked on together: about as many as the registers hold
RESULTS = ("out", "largest", "inverse", "kept")  # the forward kernel's outputs, which the backward kernel reads
# Up to this many queries are one block. In blocks of 128 the 197 queries of a DeiT would be padded to 256.
MAX_SINGLE_BLOCK = 256


def query_block(queries: int) -> int:
    """How many queries a grid step works on: all of them if they are few."""
    return queries if queries <= MAX_SINGLE_BLOCK else QUERY_BLOCK


def block_bytes(queries: int, keys: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Size of one head's part of the backward kernel's blocks and of its float32 sums."""
    return (keys * 3 + 3 * query_block(queries)) * (key_dim + value_dim) * itemsize + 4 * keys * (key_dim + value_dim)


def score_bytes(queries: int, keys: int) -> int:
    """Size of the scores of one block of queries and one head."""
    return 4 * query_block(queries) * keys


def needed_bytes(q, k, v, bias, factors) -> int:
    """The least fast memory that the backward kernel needs, for one group of heads, in bytes.

    It has two buffers of each block, two float32 sums, some six arrays of scores, and a group's masked weights. A
    factored bias adds the blocks of its factors and the marks.
    """
    layout = arrange(q.shape[2], q.shape[3], v.shape[3], bytes_per_head=1)
    size = block_bytes(q.shape[1], k.shape[1], layout.key_dim, layout.value_dim, q.dtype.itemsize)
    scores = score_bytes(q.shape[1], k.shape[1])
    needed = layout.group * (2 * size + scores * (1 if bias is None else 4)) + 6 * scores
    if factors is not None:
        block = query_block(q.shape[1])
        needed += factor_bytes(factors, q.shape[2], group=layout.group, block=block, keys=k.shape[1])
    return needed


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10, 11))
def masked_softmax(q, k, v, threshold, bias, factors, norms, heads, scale, interpret, return_qkv, sides):
    """((M P) V, the number of weights kept, q, k and v if they are returned), differentiable.

    Args:
      q: [batch, queries, heads * key_dim].
      k: [batch, keys, heads * key_dim].
      v: [batch, keys, heads * value_dim].
      threshold: [1, 1], float32.
      bias: dense and transposed, [1 or batch, heads, keys, queries]; or None.
      factors: a factored bias in the place of `bias`, from `join_factors`; or None.
      norms: batch norm's mean, factor and bias for each channel of q, k and v, [3, heads * dim] each; or None. The
        returned q, k and v are as they came.
      heads: the number of heads.
      scale: factor of the products of queries and keys.
      interpret: run as plain JAX, on any platform.
      return_qkv: whether q, k and v are returned too. The backward kernel adds its gradients to the gradients of the
        returned arrays, which saves a pass over memory for each.
      sides: (rows, columns) of the keys' grid, with factors.

    Returns:
      The branch's output, shaped like v at the queries; the number of weights that each block kept, float32; and q, k
      and v with `return_qkv`.
    """
    return _forward(q, k, v, threshold, bias, factors, norms, heads, scale, interpret, return_qkv, sides)[0]


def _arrange(q, k, v, heads, bias) -> tuple[Heads, int]:
    key_dim, value_dim = q.shape[2] // heads, v.shape[2] // heads
    size = block_bytes(q.shape[1], k.shape[1], key_dim, value_dim, q.dtype.itemsize)
    if bias is not None:
        size += 2 * score_bytes(q.shape[1], k.shape[1])
    layout = arrange(heads, key_dim, value_dim, bytes_per_head=size)
    return layout, layout.step_heads * size + score_bytes(q.shape[1], k.shape[1])


# The grid is [steps along the heads, batch, blocks of queries]. The batch comes after the heads, so that a bias that
# all images share is read once a step; where all queries are one block, its gradient is summed over the batch in fast
# memory.


def _blocks(layout: Heads, block: int, keys: int) -> dict[str, pl.BlockSpec]:
    """The blocks of every array but the bias, by the array's name in the kernels."""
    key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim
    row = pl.BlockSpec((1, 1, layout.step_heads, block), lambda h, b, i: (b, h, 0, i))  # a number per head and query
    return {
        "threshold": pl.BlockSpec(memory_space=pltpu.SMEM),
        "q": pl.BlockSpec((1, block, key_width), lambda h, b, i: (b, i, h)),
        "k": pl.BlockSpec((1, keys, key_width), lambda h, b, i: (b, 0, h)),
        "v": pl.BlockSpec((1, keys, value_width), lambda h, b, i: (b, 0, h)),
        "out": pl.BlockSpec((1, block, value_width), lambda h, b, i: (b, i, h)),
        "largest": row,
        "inverse": row,
        "kept": pl.BlockSpec((1, 1, 1, 1, LANES), lambda h, b, i: (b, h, i, 0, 0)),
    }


def _bias_blocks(layout: Heads, block: int, keys: int, shared: bool) -> pl.BlockSpec:
    shape = (1, layout.step_heads, keys, block)
    return pl.BlockSpec(shape, lambda h, b, i: (0 if shared else b, h, 0, i))


def _is_shared(bias) -> bool:
    return bias is not None and bias.shape[0] == 1


@traced_once("heads", "scale", "interpret", "return_qkv", "sides")
def _forward(q, k, v, threshold, bias, factors, norms, heads, scale, interpret, return_qkv, sides):
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    count = pl.cdiv(queries, block)
    blocks = _blocks(layout, block, keys)
    arrays = {"threshold": threshold, "q": q, "k": k, "v": v}
    row = jax.ShapeDtypeStruct((batch, layout.steps, layout.step_heads, queries), jnp.float32)
    results = {
        "out": jax.ShapeDtypeStruct((batch, queries, v.shape[2]), v.dtype),
        "largest": row,
        "inverse": row,
        "kept": jax.ShapeDtypeStruct((batch, layout.steps, count, 1, LANES), jnp.float32),
    }
    outputs = call(
        functools.partial(_forward_kernel, layout=layout, scale=scale, queries=queries, block=block),
        inputs={
            **{name: (array, blocks[name]) for name, array in arrays.items()},
            "bias": (bias, _bias_blocks(layout, block, keys, _is_shared(bias))),
            **factor_inputs(layout, block, factors, sides),
            **norm_inputs(norms, layout.step_widths, step=0),
        },
        outputs={name: (shape, blocks[name]) for name, shape in results.items()},
        scratch={"masked": pltpu.VMEM((layout.step_heads, keys, block), q.dtype)},
        grid=(layout.steps, batch, count),
        compiler_params=compiler_params("parallel", "parallel", "parallel", block_bytes=size),
        interpret=interpret,
        name="masked_softmax_forward",
    )
    returned = (q, k, v) if return_qkv else ()
    residuals = (q, k, v, threshold, bias, factors, norms, *(outputs[name] for name in RESULTS))
    return (outputs["out"], outputs["kept"][..., 0], *returned), residuals


@traced_once("heads", "scale", "interpret", "return_qkv", "sides")
def _backward(heads, scale, interpret, return_qkv, sides, residuals, cotangents):
    q, k, v, threshold, bias, factors, norms, *results = residuals
    layout, size = _arrange(q, k, v, heads, bias)
    (batch, queries, _), keys = q.shape, k.shape[1]
    block = query_block(queries)
    count = pl.cdiv(queries, block)
    blocks = _blocks(layout, block, keys)
    arrays = {"threshold": threshold, "q": q, "k": k, "v": v}
    cotangent, _, *added = cotangents
    added_q, added_k, added_v = added or (None, None, None)
    # Summed over the batch in fast memory only if the steps of all images write the same block, one after the other.
    summed = _is_shared(bias) and count == 1
    d_bias = None if bias is None else jax.ShapeDtypeStruct((1 if summed else batch, *bias.shape[1:]), jnp.float32)
    inputs = {
        **{name: (array, blocks[name]) for name, array in arrays.items()},
        "cotangent": (cotangent, blocks["out"]),
        **{name: (array, blocks[name]) for name, array in zip(RESULTS, results, strict=True)},
        "added_q": (added_q, blocks["q"]),
        "added_k": (added_k, blocks["k"]),
        "added_v": (added_v, blocks["v"]),
        "bias": (bias, _bias_blocks(layout, block, keys, _is_shared(bias))),
        **factor_inputs(layout, block, factors, sides),
        **norm_inputs(norms, layout.step_widths, step=0),
    }
    gradients = call(
        functools.partial(_backward_kernel, layout=layout, scale=scale, queries=queries, block=block, summed=summed),
        inputs=inputs,
        outputs={
            **{f"d_{name}": inputs[name] for name in ("q", "k", "v")},
            "d_bias": (d_bias, _bias_blocks(layout, block, keys, summed)),
            "d_factors": inputs["factors"],
            **norm_outputs(norms, layout.step_widths, batch, axes=(1, 0)),
        },
        scratch={
            "dk_sum": pltpu.VMEM((keys, layout.step_heads * layout.key_dim), jnp.float32),
            "dv_sum": pltpu.VMEM((keys, layout.step_heads * layout.value_dim), jnp.float32),
        },
        aliases={f"added_{name}": f"d_{name}" for name in ("q", "k", "v")},
        grid=(layout.steps, batch, count),
        compiler_params=compiler_params(
            "parallel", "arbitrary" if summed else "parallel", "arbitrary", block_bytes=size
        ),
        interpret=interpret,
        name="masked_softmax_backward",
    )
    d_bias, d_factors = gradients["d_bias"], gradients["d_factors"]
    if d_bias is not None:
        d_bias = (d_bias if d_bias.shape == bias.shape else d_bias.sum(0, keepdims=True)).astype(bias.dtype)
    if d_factors is not None:
        d_factors = jnp.moveaxis(d_factors, 0, 2).reshape(factors.shape)
    of_arrays = (gradients[f"d_{name}"] for name in ("q", "k", "v"))
    return *of_arrays, jnp.zeros_like(threshold), d_bias, d_factors, norm_gradients(norms, gradients)


masked_softmax.defvjp(_forward, _backward)


def of_head(x: jax.Array, member: int, dim: int) -> jax.Array:
    """[tokens, lanes of a group], with zeros in the lanes of every head but one."""
    return jnp.where(lanes_of_head(member, dim, x.shape), x, 0)


def is_kept(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Whether a weight passes the mask. NaN passes, so that it reaches the output and is noticed."""
    return ~(weights <= threshold)


def d_scores_of(dot, weights, masked, v, cotangent, out):
    """The gradient of the scores, [keys, queries]: P (M dP - D), where D = rowsum(dO O) is a row.

    The cotangent is zero in the lanes of other heads, which leaves these heads' values and outputs out.
    """
    column = jnp.sum(cotangent * out, axis=1, keepdims=True)
    projection = jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]
    return masked * dot(v, cotangent, NT) - weights * projection


def _forward_kernel(refs: Refs, *, layout: Heads, scale, queries, block):
    dot = product(refs.q.dtype)
    threshold = refs.threshold[0, 0]
    # The last block may reach beyond the queries, where weights are not counted.
    valid = pl.program_id(2) * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < queries
    keys = refs.k.shape[1]
    chunks = [slice(start, min(start + KEY_CHUNK, keys)) for start in range(0, keys, KEY_CHUNK)]
    kept = jnp.zeros((1, block), jnp.float32)
    for heads, [lanes] in layout.windows(layout.key_dim):
        # The queries are scaled rather than the scores: key_dim numbers a query instead of one for every key.
        q = read(refs, "q", lanes).astype(jnp.float32) * scale
        chunks_of_keys = [read(refs, "k", lanes, chunk) for chunk in chunks]
        for member, head in enumerate(heads):
            query = of_head(q, member, layout.key_dim)
            parts = [dot(chunk, query, NT) for chunk in chunks_of_keys]  # [keys, queries]
            if refs.bias is not None:
                parts = [
                    part + refs.bias[0, head, chunk].astype(jnp.float32)
                    for part, chunk in zip(parts, chunks, strict=True)
                ]
            if refs.factors is not None:
                factor_slice, marks = factor_lanes(head, refs)
                factors = refs.factors[0, 0, :, factor_slice]
                parts = [part + dot(marks[chunk], factors, NT) for part, chunk in zip(parts, chunks, strict=True)]
            largest = functools.reduce(jnp.maximum, [jnp.max(part, axis=0, keepdims=True) for part in parts])
            parts = [jnp.exp(part - largest) for part in parts]
            inverse = 1 / sum(jnp.sum(part, axis=0, keepdims=True) for part in parts)
            for part, chunk in zip(parts, chunks, strict=True):
                weights = part * inverse
                keep = is_kept(weights, threshold)
                refs.masked[head, chunk] = jnp.where(keep, weights, 0).astype(refs.masked.dtype)
                kept += jnp.sum(keep.astype(jnp.float32), axis=0, keepdims=True)
            refs.largest[0, 0, head : head + 1, :] = largest
            refs.inverse[0, 0, head : head + 1, :] = inverse
    total = jnp.sum(jnp.where(valid, kept, 0), axis=1, keepdims=True)
    # From a threshold of 1 on the mask is empty by definition. Comparing does not suffice: rounding can lift a weight
    # above 1.
    total = jnp.where(threshold < 1, total, 0)
    refs.kept[0, 0, 0] = jnp.broadcast_to(total, (1, LANES))
    any_kept = jnp.max(total) > 0

    @pl.when(any_kept)
    def _():
        for heads, [lanes] in layout.windows(layout.value_dim):
            out, v = jnp.zeros((lanes.stop - lanes.start, block), jnp.float32), read(refs, "v", lanes)
            for member, head in enumerate(heads):
                attended = dot(v, refs.masked[head], TN)
                out = jnp.where(rows_of_head(member, layout.value_dim, out.shape), attended, out)
            refs.out[0, :, lanes] = jnp.transpose(out).astype(refs.out.dtype)

    @pl.when(~any_kept)
    def _():
        refs.out[...] = jnp.zeros_like(refs.out)


def _set_to_zero(ref) -> None:
    if ref is not None:
        ref[...] = jnp.zeros_like(ref)


def _write(out_ref, gradient, added_ref, lanes: slice) -> None:
    """Writes an image's gradient, with what came from the next attention."""
    if added_ref is not None:
        gradient += added_ref[0, :, lanes].astype(jnp.float32)
    out_ref[0, :, lanes] = gradient.astype(out_ref.dtype)


def _backward_kernel(refs: Refs, *, layout: Heads, scale, queries, block, summed):
    dot = product(refs.q.dtype)
    threshold = refs.threshold[0, 0]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for sum_ref in (refs.dk_sum, refs.dv_sum, refs.sums_q):
            _set_to_zero(sum_ref)

    if refs.bias is not None:
        pl.when((pl.program_id(1) == 0) | (not summed))(functools.partial(_set_to_zero, refs.d_bias))

    @pl.when(jnp.max(refs.kept[0, 0, 0]) > 0)
    def _():
        # Rows beyond the queries may hold anything, even NaN. They become zero, so that they add nothing to the sums.
        valid = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < queries
        valid_row = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < queries
        value_windows = [
            (
                heads,
                lanes,
                read(refs, "v", lanes),
                jnp.where(valid, refs.cotangent[0, :, lanes].astype(jnp.float32), 0),
                jnp.where(valid, refs.out[0, :, lanes].astype(jnp.float32), 0),
            )
            for heads, [lanes] in layout.windows(layout.value_dim)
        ]
        d_factors: dict[int, tuple[slice, jax.Array]] = {}
        for heads, [key_lanes] in layout.windows(layout.key_dim):
            k = read(refs, "k", key_lanes)
            q = jnp.where(valid, read(refs, "q", key_lanes).astype(jnp.float32) * scale, 0)
            dq = jnp.zeros((q.shape[1], block), jnp.float32)
            for member, head in enumerate(heads):
                query = of_head(q, member, layout.key_dim)
                # Windows of the values may have other heads than the windows of the keys.
                together, value_lanes, v, cotangent, out = next(w for w in value_windows if head in w[0])
                d_out = of_head(cotangent, together.index(head), layout.value_dim)
                scores = dot(k, query, NT)  # [keys, queries]
                if refs.bias is not None:
                    scores += jnp.where(valid_row, refs.bias[0, head].astype(jnp.float32), 0)
                if refs.factors is not None:
                    factor_slice, marks = factor_lanes(head, refs)
                    scores += jnp.where(valid_row, dot(marks, refs.factors[0, 0, :, factor_slice], NT), 0)
                largest = jnp.where(valid_row, refs.largest[0, 0, head : head + 1, :], 0)
                inverse = jnp.where(valid_row, refs.inverse[0, 0, head : head + 1, :], 0)
                # The forward pass, operation by operation: a weight next to the threshold must fall on the same side.
                weights = jnp.exp(scores - largest) * inverse
                masked = jnp.where(is_kept(weights, threshold), weights, 0)
                d_scores = d_scores_of(dot, weights, masked, v, d_out, out)
                refs.dv_sum[:, value_lanes] += dot(masked, d_out, NN)
                refs.dk_sum[:, key_lanes] += dot(d_scores, query, NN)
                dq = jnp.where(rows_of_head(member, layout.key_dim, dq.shape), dot(k, d_scores, TN), dq)
                if refs.bias is not None:
                    refs.d_bias[0, head] += d_scores
                if refs.factors is not None:
                    # Heads that share these lanes are summed: each head's gradient is zero in the lanes of the others.
                    _, before = d_factors.get(factor_slice.start, (None, 0))
                    d_factors[factor_slice.start] = factor_slice, before + dot(d_scores, marks, TN)
            dq = through_channel_norm(refs, "q", key_lanes, jnp.transpose(dq * scale), valid, add=True)
            _write(refs.d_q, dq, refs.added_q, key_lanes)
        for lanes, d_factor in d_factors.values():
            refs.d_factors[0, 0, :, lanes] = d_factor.astype(refs.d_factors.dtype)

    # Where no weight was kept, the branch has no gradient.
    @pl.when(jnp.max(refs.kept[0, 0, 0]) == 0)
    def _():
        refs.d_q[...] = jnp.zeros_like(refs.d_q) if refs.added_q is None else refs.added_q[...]
        if refs.factors is not None:
            _set_to_zero(refs.d_factors)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for _, [lanes] in layout.windows(layout.key_dim):
            dk = through_channel_norm(refs, "k", lanes, refs.dk_sum[:, lanes])
            _write(refs.d_k, dk, refs.added_k, lanes)
        for _, [lanes] in layout.windows(layout.value_dim):
            dv = through_channel_norm(refs, "v", lanes, refs.dv_sum[:, lanes])
            _write(refs.d_v, dv, refs.added_v, lanes)
