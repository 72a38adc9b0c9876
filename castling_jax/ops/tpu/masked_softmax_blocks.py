"""The masked softmax branch over blocks of keys, where fast memory does not hold a query block's scores for all keys.

A weight can be compared with the threshold only when its row's normaliser is known, so the forward pass has two
kernels: the first finds each row's maximum and normaliser, the second multiplies the weights that pass with the values.
The backward pass has two kernels as well: one sums over keys (the queries' gradient), one over queries (the gradients
of keys and values). A block where no weight passes the threshold skips its products with the values. A block of queries
whose whole rows kept no weight skips its backward pass.

As in masked_softmax.py scores lie [keys, queries]: one number per query is a row, and no array of queries x keys is
ever transposed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.call import Operand, Refs, call
from castling_jax.ops.tpu.layout import (
    LANES,
    NN,
    NT,
    TN,
    Heads,
    arrange,
    compiler_params,
    product,
    rows_of_head,
    traced_once,
)
from castling_jax.ops.tpu.masked_softmax import d_scores_of, is_kept, of_head

QUERY_BLOCK = 256
KEY_BLOCK = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def masked_softmax(q, k, v, threshold, bias, heads, scale, interpret):
    """((M P) V, the number of weights kept), differentiable; arguments as in masked_softmax.masked_softmax."""
    return _forward(q, k, v, threshold, bias, heads, scale, interpret)[0]


class _Call:
    """What the four kernels have in common: sizes, blocks by the arrays' names, and the call.

    The grid is [steps along the heads, batch, outer blocks, inner blocks]. A kernel sums over the inner blocks.
    """

    def __init__(self, q, k, v, bias, heads: int, scale: float, interpret: bool, *, keys_inside: bool):
        queries, keys = q.shape[1], k.shape[1]
        query_block = min(QUERY_BLOCK, pl.cdiv(queries, LANES) * LANES)
        key_block = min(KEY_BLOCK, pl.cdiv(keys, 16) * 16)  # 16 rows are a register of bfloat16
        self.block = key_block, query_block
        self.counts = (pl.cdiv(queries, query_block), pl.cdiv(keys, key_block))
        key_dim, value_dim = q.shape[2] // heads, v.shape[2] // heads
        rows = 2 * query_block + 2 * key_block
        size = rows * (key_dim + value_dim) * q.dtype.itemsize + 4 * query_block * key_block
        self.layout = arrange(heads, key_dim, value_dim, bytes_per_head=size)
        self.bytes = self.layout.step_heads * size
        self.batch, self.keys_inside, self.interpret = q.shape[0], keys_inside, interpret
        self.static = {
            "layout": self.layout,
            "scale": scale,
            "queries": queries,
            "keys": keys,
            "dtype": q.dtype,
            "query_axis": 2 if keys_inside else 3,
        }
        self.blocks = self._blocks(query_block, key_block, shared_bias=bias is not None and bias.shape[0] == 1)

    def _blocks(self, query_block: int, key_block: int, *, shared_bias: bool) -> dict[str, pl.BlockSpec]:
        layout = self.layout
        key_width, value_width = layout.step_heads * layout.key_dim, layout.step_heads * layout.value_dim

        def blocks(shape, index):
            """`index` takes (step along the heads, image, block of queries, block of keys)."""
            if self.keys_inside:
                return pl.BlockSpec(shape, index)
            return pl.BlockSpec(shape, lambda h, b, j, i: index(h, b, i, j))

        out = blocks((1, query_block, value_width), lambda h, b, i, j: (b, i, h))
        row = blocks((1, 1, layout.step_heads, query_block), lambda h, b, i, j: (b, h, 0, i))
        bias_shape = (1, layout.step_heads, key_block, query_block)
        return {
            "threshold": pl.BlockSpec(memory_space=pltpu.SMEM),
            "q": blocks((1, query_block, key_width), lambda h, b, i, j: (b, i, h)),
            "k": blocks((1, key_block, key_width), lambda h, b, i, j: (b, j, h)),
            "v": blocks((1, key_block, value_width), lambda h, b, i, j: (b, j, h)),
            "cotangent": out,
            "out": out,
            "largest": row,
            "inverse": row,
            "kept": blocks((1, 1, 1, 1, LANES), lambda h, b, i, j: (b, h, i, 0, 0)),
            "bias": blocks(bias_shape, lambda h, b, i, j: (0 if shared_bias else b, h, j, i)),
            "d_bias": blocks(bias_shape, lambda h, b, i, j: (b, h, j, i)),
        }

    def named(self, **arrays: Any) -> dict[str, Operand]:
        """Arrays, or shapes, with their blocks."""
        return {name: (array, self.blocks[name]) for name, array in arrays.items()}

    def __call__(self, kernel, name: str, inputs, outputs, scratch):
        outer, inner = self.counts if self.keys_inside else reversed(self.counts)
        return call(
            functools.partial(kernel, **self.static),
            inputs=inputs,
            outputs=outputs,
            scratch={name: pltpu.VMEM(shape, dtype) for name, (shape, dtype) in scratch.items()},
            grid=(self.layout.steps, self.batch, outer, inner),
            compiler_params=compiler_params("parallel", "parallel", "parallel", "arbitrary", block_bytes=self.bytes),
            interpret=self.interpret,
            name=name,
        )


@traced_once("heads", "scale", "interpret")
def _forward(q, k, v, threshold, bias, heads, scale, interpret):
    run = _Call(q, k, v, bias, heads, scale, interpret, keys_inside=True)
    layout, (key_block, query_block) = run.layout, run.block
    batch, queries, _ = q.shape
    # One number per head and query. Float32, as the scores are: the backward kernels must find the same weights.
    row = jax.ShapeDtypeStruct((batch, layout.steps, layout.step_heads, queries), jnp.float32)
    rows = run(
        _normaliser_kernel,
        "masked_softmax_normaliser",
        run.named(q=q, k=k, bias=bias),
        run.named(largest=row, inverse=row),
        {},
    )
    outputs = run(
        _attend_kernel,
        "masked_softmax_attend",
        run.named(threshold=threshold, q=q, k=k, v=v, **rows, bias=bias),
        run.named(
            out=jax.ShapeDtypeStruct((batch, queries, v.shape[2]), v.dtype),
            kept=jax.ShapeDtypeStruct((batch, layout.steps, run.counts[0], 1, LANES), jnp.float32),
        ),
        {
            "masked": ((layout.step_heads, key_block, query_block), q.dtype),
            "sum": ((layout.step_heads * layout.value_dim, query_block), jnp.float32),
        },
    )
    out, kept = outputs["out"], outputs["kept"]
    return (out, kept[..., 0]), (q, k, v, threshold, bias, out, rows["largest"], rows["inverse"], kept)


@traced_once("heads", "scale", "interpret")
def _backward(heads, scale, interpret, residuals, cotangents):
    q, k, v, threshold, bias, out, largest, inverse, kept = residuals
    rows = {"out": out, "largest": largest, "inverse": inverse, "kept": kept}
    arrays = {"threshold": threshold, "q": q, "k": k, "v": v, "cotangent": cotangents[0], **rows, "bias": bias}

    run = _Call(q, k, v, bias, heads, scale, interpret, keys_inside=True)
    layout, (key_block, query_block) = run.layout, run.block
    inputs = run.named(**arrays)
    # A shared bias too has a gradient for each image here: images are worked on in parallel.
    d_bias = None if bias is None else jax.ShapeDtypeStruct((q.shape[0], *bias.shape[1:]), bias.dtype)
    of_queries = run(
        _query_gradient_kernel,
        "masked_softmax_query_gradient",
        inputs,
        {"d_q": inputs["q"], **run.named(d_bias=d_bias)},
        {"sum": ((layout.step_heads * layout.key_dim, query_block), jnp.float32)},
    )
    run = _Call(q, k, v, bias, heads, scale, interpret, keys_inside=False)
    inputs = run.named(**arrays)
    of_keys = run(
        _key_gradient_kernel,
        "masked_softmax_key_gradient",
        inputs,
        {"d_k": inputs["k"], "d_v": inputs["v"]},
        {
            "dk_sum": ((key_block, layout.step_heads * layout.key_dim), jnp.float32),
            "dv_sum": ((key_block, layout.step_heads * layout.value_dim), jnp.float32),
        },
    )
    d_bias = of_queries["d_bias"]
    if bias is not None and bias.shape[0] == 1:
        d_bias = d_bias.sum(0, keepdims=True).astype(bias.dtype)
    return of_queries["d_q"], of_keys["d_k"], of_keys["d_v"], jnp.zeros_like(threshold), d_bias


masked_softmax.defvjp(_forward, _backward)


class _Block:
    """The block of scores that a grid step works on."""

    def __init__(self, refs: Refs, *, layout: Heads, scale, queries, keys, dtype, query_axis):
        self.refs, self.layout, self.scale = refs, layout, scale
        self.dot = product(dtype)
        block = (refs.k.shape[1], refs.q.shape[1])
        place = [pl.program_id(axis) * size for axis, size in zip((5 - query_axis, query_axis), block, strict=True)]
        self.valid_keys = place[0] + jax.lax.broadcasted_iota(jnp.int32, (block[0], 1), 0) < keys
        self.valid_queries = place[1] + jax.lax.broadcasted_iota(jnp.int32, (block[1], 1), 0) < queries
        self.valid_row = place[1] + jax.lax.broadcasted_iota(jnp.int32, (1, block[1]), 1) < queries
        self.first = pl.program_id(3) == 0
        self.last = pl.program_id(3) == pl.num_programs(3) - 1

    def keys_of(self, ref, lanes):
        """A block of keys or values, zero beyond the last key: what lies there may be anything, even NaN."""
        return jnp.where(self.valid_keys, ref[0, :, lanes].astype(jnp.float32), 0)

    def queries_of(self, ref, lanes):
        """A block of an array with one row per query, zero beyond the last query."""
        return jnp.where(self.valid_queries, ref[0, :, lanes].astype(jnp.float32), 0)

    def heads(self):
        """(head, group, member of the group) for each head of the step."""
        for group in range(self.layout.step):
            for member in range(self.layout.group):
                yield group * self.layout.group + member, group, member

    def query(self, group, member):
        """The scaled queries of a head, zero in the lanes of other heads."""
        scaled = self.queries_of(self.refs.q, self.layout.key_lanes(group)) * self.scale
        return of_head(scaled, member, self.layout.key_dim)

    def scores(self, head, group, query):
        """The scores of a head, [keys, queries]."""
        scores = self.dot(self.keys_of(self.refs.k, self.layout.key_lanes(group)), query, NT)
        if self.refs.bias is not None:
            scores += jnp.where(self.valid_row, self.refs.bias[0, head].astype(jnp.float32), 0)
        return jnp.where(self.valid_keys, scores, -jnp.inf)

    def weights(self, scores, head):
        """The softmax weights, operation by operation as in the forward pass.

        A weight next to the threshold must fall on the same side in all kernels.
        """
        largest = jnp.where(self.valid_row, self.refs.largest[0, 0, head : head + 1, :], 0)
        inverse = jnp.where(self.valid_row, self.refs.inverse[0, 0, head : head + 1, :], 0)
        return jnp.exp(scores - largest) * inverse


def _normaliser_kernel(refs: Refs, **static):
    block = _Block(refs, **static)

    @pl.when(block.first)
    def _():
        refs.largest[...] = jnp.full_like(refs.largest, -jnp.inf)
        refs.inverse[...] = jnp.zeros_like(refs.inverse)

    for head, group, member in block.heads():
        row = slice(head, head + 1)
        scores = block.scores(head, group, block.query(group, member))
        before = refs.largest[0, 0, row, :]
        largest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        shift = jnp.where(largest == -jnp.inf, 0, largest)  # a bias may be -inf for all keys up to here
        total = refs.inverse[0, 0, row, :] * jnp.exp(before - shift)
        refs.inverse[0, 0, row, :] = total + jnp.sum(jnp.exp(scores - shift), axis=0, keepdims=True)
        refs.largest[0, 0, row, :] = largest

    @pl.when(block.last)
    def _():
        refs.inverse[...] = 1 / refs.inverse[...]


def _attend_kernel(refs: Refs, **static):
    block, layout = _Block(refs, **static), static["layout"]
    threshold = refs.threshold[0, 0]

    @pl.when(block.first)
    def _():
        refs.sum[...] = jnp.zeros_like(refs.sum)
        refs.kept[...] = jnp.zeros_like(refs.kept)

    total = jnp.zeros((1, 1), jnp.float32)
    for head, group, member in block.heads():
        scores = block.scores(head, group, block.query(group, member))
        weights = block.weights(scores, head)
        keep = is_kept(weights, threshold)
        refs.masked[head] = jnp.where(keep, weights, 0).astype(refs.masked.dtype)
        total += jnp.sum(jnp.sum(keep.astype(jnp.float32), axis=0, keepdims=True), axis=1, keepdims=True)
    # From a threshold of 1 on the mask is empty by definition. Comparing does not suffice: rounding can lift a weight
    # above 1.
    total = jnp.where(threshold < 1, total, 0)
    refs.kept[0, 0, 0] += jnp.broadcast_to(total, (1, LANES))

    @pl.when(jnp.max(total) > 0)
    def _():
        for head, group, member in block.heads():
            values = block.keys_of(refs.v, layout.value_lanes(group))
            attended = block.dot(values, refs.masked[head], TN)
            rows = layout.value_lanes(group)
            refs.sum[rows] += jnp.where(rows_of_head(member, layout.value_dim, attended.shape), attended, 0)

    @pl.when(block.last)
    def _():
        refs.out[0] = jnp.transpose(refs.sum[...]).astype(refs.out.dtype)


def _query_gradient_kernel(refs: Refs, **static):
    block, layout = _Block(refs, **static), static["layout"]

    @pl.when(block.first)
    def _():
        refs.sum[...] = jnp.zeros_like(refs.sum)

    if refs.bias is not None:
        refs.d_bias[...] = jnp.zeros_like(refs.d_bias)

    @pl.when(jnp.max(refs.kept[0, 0, 0]) > 0)
    def _():
        for head, group, member in block.heads():
            weights = block.weights(block.scores(head, group, block.query(group, member)), head)
            values, keys = layout.value_lanes(group), layout.key_lanes(group)
            cotangent = of_head(block.queries_of(refs.cotangent, values), member, layout.value_dim)
            out, v = block.queries_of(refs.out, values), block.keys_of(refs.v, values)
            masked = jnp.where(is_kept(weights, refs.threshold[0, 0]), weights, 0)
            d_scores = d_scores_of(block.dot, weights, masked, v, cotangent, out)
            d_query = block.dot(block.keys_of(refs.k, keys), d_scores, TN)
            refs.sum[keys] += jnp.where(rows_of_head(member, layout.key_dim, d_query.shape), d_query, 0)
            if refs.bias is not None:
                refs.d_bias[0, head] = d_scores.astype(refs.d_bias.dtype)

    @pl.when(block.last)
    def _():
        refs.d_q[0] = jnp.transpose(refs.sum[...] * block.scale).astype(refs.d_q.dtype)


def _key_gradient_kernel(refs: Refs, **static):
    block, layout = _Block(refs, **static), static["layout"]

    @pl.when(block.first)
    def _():
        refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)
        refs.dv_sum[...] = jnp.zeros_like(refs.dv_sum)

    @pl.when(jnp.max(refs.kept[0, 0, 0]) > 0)
    def _():
        for head, group, member in block.heads():
            query = block.query(group, member)
            weights = block.weights(block.scores(head, group, query), head)
            values, keys = layout.value_lanes(group), layout.key_lanes(group)
            cotangent = of_head(block.queries_of(refs.cotangent, values), member, layout.value_dim)
            out, v = block.queries_of(refs.out, values), block.keys_of(refs.v, values)
            masked = jnp.where(is_kept(weights, refs.threshold[0, 0]), weights, 0)
            d_scores = d_scores_of(block.dot, weights, masked, v, cotangent, out)
            refs.dv_sum[:, values] += block.dot(masked, cotangent, NN)
            refs.dk_sum[:, keys] += block.dot(d_scores, query, NN)

    @pl.when(block.last)
    def _():
        refs.d_k[0] = refs.dk_sum[...].astype(refs.d_k.dtype)
        refs.d_v[0] = refs.dv_sum[...].astype(refs.d_v.dtype)
