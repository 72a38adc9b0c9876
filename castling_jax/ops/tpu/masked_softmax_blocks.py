"""The masked softmax branch over blocks of keys, for more keys than a block of queries can meet in fast memory at once.

Two passes forward, for a weight is compared with the threshold only when its row's normaliser is known: the first
finds each row's maximum and normaliser, the second takes the weights that pass to the values. Two kernels backward, one
that sums over keys (the queries' gradient) and one that sums over queries (the keys' and values'). A block where
nothing survives the threshold skips its products with the values; a block of queries whose whole rows kept nothing
skips its backward pass.

As in masked_softmax.py scores lie [keys, queries], so that what is one number a query is a row, and an array of
queries x keys is never transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    """((M P) V, weights kept), differentiable; as masked_softmax.masked_softmax."""
    return _forward(q, k, v, threshold, bias, heads, scale, interpret)[0]


class _Call:
    """What the four kernels have in common: sizes, blocks, and how each is called.

    The grid is [steps along the heads, batch, outer blocks, inner blocks]; the inner ones are summed over.
    """

    def __init__(self, q, k, v, bias, heads: int, scale: float, interpret: bool, *, keys_inside: bool):
        self.batch, self.queries, _ = q.shape
        self.keys = k.shape[1]
        self.query_block = min(QUERY_BLOCK, pl.cdiv(self.queries, LANES) * LANES)
        self.key_block = min(KEY_BLOCK, pl.cdiv(self.keys, 16) * 16)
        self.counts = (pl.cdiv(self.queries, self.query_block), pl.cdiv(self.keys, self.key_block))
        key_dim, value_dim = q.shape[2] // heads, v.shape[2] // heads
        rows = 2 * self.query_block + 2 * self.key_block
        size = rows * (key_dim + value_dim) * q.dtype.itemsize + 4 * self.query_block * self.key_block
        self.layout: Heads = arrange(heads, key_dim, value_dim, bytes_per_head=size)
        self.bytes = self.layout.step_heads * size
        self.shared_bias = bias is not None and bias.shape[0] == 1
        self.keys_inside = keys_inside
        self.static = {
            "layout": self.layout,
            "scale": scale,
            "queries": self.queries,
            "keys": self.keys,
            "has_bias": bias is not None,
            "dtype": q.dtype,
            "query_axis": 2 if keys_inside else 3,
        }
        self.interpret = interpret

    def _spec(self, shape, index):
        """`index` takes (step along the heads, image, block of queries, block of keys)."""
        if self.keys_inside:
            return pl.BlockSpec(shape, index)
        return pl.BlockSpec(shape, lambda h, b, j, i: index(h, b, i, j))

    def query_spec(self, dim):
        return self._spec((1, self.query_block, self.layout.step_heads * dim), lambda h, b, i, j: (b, i, h))

    def key_spec(self, dim):
        return self._spec((1, self.key_block, self.layout.step_heads * dim), lambda h, b, i, j: (b, j, h))

    def row_spec(self):
        """One number a head and query."""
        return self._spec((1, 1, self.layout.step_heads, self.query_block), lambda h, b, i, j: (b, h, 0, i))

    def row_shape(self):
        layout = self.layout
        return jax.ShapeDtypeStruct((self.batch, layout.steps, layout.step_heads, self.queries), jnp.float32)

    def kept_spec(self):
        """How many weights a block of queries kept."""
        return self._spec((1, 1, 1, 1, LANES), lambda h, b, i, j: (b, h, i, 0, 0))

    def kept_shape(self):
        return jax.ShapeDtypeStruct((self.batch, self.layout.steps, self.counts[0], 1, LANES), jnp.float32)

    def bias_spec(self, *, of_each: bool = False):
        shape = (1, self.layout.step_heads, self.key_block, self.query_block)
        shared = self.shared_bias and not of_each
        return self._spec(shape, lambda h, b, i, j: (0 if shared else b, h, j, i))

    def __call__(self, kernel, name, inputs, specs, outputs, scratch):
        outer, inner = self.counts if self.keys_inside else reversed(self.counts)
        return pl.pallas_call(
            functools.partial(kernel, **self.static),
            grid=(self.layout.steps, self.batch, outer, inner),
            in_specs=specs,
            out_specs=[spec for spec, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            compiler_params=compiler_params("parallel", "parallel", "parallel", "arbitrary", block_bytes=self.bytes),
            interpret=self.interpret,
            name=name,
        )(*inputs)


@traced_once("heads", "scale", "interpret")
def _forward(q, k, v, threshold, bias, heads, scale, interpret):
    call = _Call(q, k, v, bias, heads, scale, interpret, keys_inside=True)
    layout = call.layout
    biases = ([], []) if bias is None else ([bias], [call.bias_spec()])
    largest, inverse = call(
        _normaliser_kernel,
        "masked_softmax_normaliser",
        [q, k, *biases[0]],
        [call.query_spec(layout.key_dim), call.key_spec(layout.key_dim), *biases[1]],
        [(call.row_spec(), call.row_shape())] * 2,
        [],
    )
    out, kept = call(
        _attend_kernel,
        "masked_softmax_attend",
        [threshold, q, k, v, largest, inverse, *biases[0]],
        [
            pl.BlockSpec(memory_space=pltpu.SMEM),
            call.query_spec(layout.key_dim),
            call.key_spec(layout.key_dim),
            call.key_spec(layout.value_dim),
            call.row_spec(),
            call.row_spec(),
            *biases[1],
        ],
        [
            (call.query_spec(layout.value_dim), jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), v.dtype)),
            (call.kept_spec(), call.kept_shape()),
        ],
        [
            ((layout.step_heads, call.key_block, call.query_block), q.dtype),
            ((layout.step_heads * layout.value_dim, call.query_block), jnp.float32),
        ],
    )
    return (out, kept[..., 0]), (q, k, v, threshold, bias, out, largest, inverse, kept)


@traced_once("heads", "scale", "interpret")
def _backward(heads, scale, interpret, residuals, cotangents):
    q, k, v, threshold, bias, out, largest, inverse, kept = residuals
    inputs = [threshold, q, k, v, cotangents[0], out, largest, inverse, kept]

    def call(kernel, name, gradients, sums, *, keys_inside):
        call = _Call(q, k, v, bias, heads, scale, interpret, keys_inside=keys_inside)
        layout = call.layout
        specs = [
            pl.BlockSpec(memory_space=pltpu.SMEM),
            call.query_spec(layout.key_dim),
            call.key_spec(layout.key_dim),
            call.key_spec(layout.value_dim),
            call.query_spec(layout.value_dim),
            call.query_spec(layout.value_dim),
            call.row_spec(),
            call.row_spec(),
            call.kept_spec(),
            *([] if bias is None else [call.bias_spec()]),
        ]
        all_inputs = inputs if bias is None else [*inputs, bias]
        return call(kernel, name, all_inputs, specs, gradients(call), sums(call))

    def query_gradients(call):
        gradients = [(call.query_spec(call.layout.key_dim), q)]
        if bias is not None:
            shape = jax.ShapeDtypeStruct((q.shape[0], *bias.shape[1:]), bias.dtype)
            gradients.append((call.bias_spec(of_each=True), shape))
        return gradients

    def key_gradients(call):
        return [(call.key_spec(call.layout.key_dim), k), (call.key_spec(call.layout.value_dim), v)]

    dq, *d_biases = call(
        _query_gradient_kernel,
        "masked_softmax_query_gradient",
        query_gradients,
        lambda call: [((call.layout.step_heads * call.layout.key_dim, call.query_block), jnp.float32)],
        keys_inside=True,
    )
    dk, dv = call(
        _key_gradient_kernel,
        "masked_softmax_key_gradient",
        key_gradients,
        lambda call: [
            ((call.key_block, call.layout.step_heads * dim), jnp.float32)
            for dim in (call.layout.key_dim, call.layout.value_dim)
        ],
        keys_inside=False,
    )
    d_bias = None
    if bias is not None:
        d_bias = d_biases[0].sum(0, keepdims=True).astype(bias.dtype) if bias.shape[0] == 1 else d_biases[0]
    return dq, dk, dv, jnp.zeros_like(threshold), d_bias


masked_softmax.defvjp(_forward, _backward)


class _Block:
    """One grid step's place, and its scores."""

    def __init__(self, q_ref, k_ref, bias_refs, *, layout, scale, queries, keys, has_bias, dtype, query_axis):
        self.q_ref, self.k_ref = q_ref, k_ref
        self.bias_ref = bias_refs[0] if has_bias else None
        self.layout, self.scale = layout, scale
        self.dot = product(dtype)
        block = (k_ref.shape[1], q_ref.shape[1])
        place = [pl.program_id(axis) * size for axis, size in zip((5 - query_axis, query_axis), block, strict=True)]
        self.valid_keys = place[0] + jax.lax.broadcasted_iota(jnp.int32, (block[0], 1), 0) < keys
        self.valid_queries = place[1] + jax.lax.broadcasted_iota(jnp.int32, (block[1], 1), 0) < queries
        self.valid_row = place[1] + jax.lax.broadcasted_iota(jnp.int32, (1, block[1]), 1) < queries
        self.first = pl.program_id(3) == 0
        self.last = pl.program_id(3) == pl.num_programs(3) - 1

    def keys_of(self, ref, lanes):
        """A block of keys or values, zero beyond the last: what lies there may be anything, NaN too."""
        return jnp.where(self.valid_keys, ref[0, :, lanes].astype(jnp.float32), 0)

    def queries_of(self, ref, lanes):
        """A block of what lies as the queries do, likewise."""
        return jnp.where(self.valid_queries, ref[0, :, lanes].astype(jnp.float32), 0)

    def heads(self):
        """(head, group, member) of each."""
        for group in range(self.layout.step):
            for member in range(self.layout.group):
                yield group * self.layout.group + member, group, member

    def query(self, group, member):
        """The scaled queries of a head, zero in the other lanes."""
        scaled = self.queries_of(self.q_ref, self.layout.key_lanes(group)) * self.scale
        return of_head(scaled, member, self.layout.key_dim)

    def scores(self, head, group, query):
        """[keys, queries] of a head."""
        scores = self.dot(self.keys_of(self.k_ref, self.layout.key_lanes(group)), query, NT)
        if self.bias_ref is not None:
            scores += jnp.where(self.valid_row, self.bias_ref[0, head].astype(jnp.float32), 0)
        return jnp.where(self.valid_keys, scores, -jnp.inf)

    def weights(self, scores, head, largest_ref, inverse_ref):
        """As in the forward pass, operation by operation: a weight on the threshold is masked in all or in none."""
        largest = jnp.where(self.valid_row, largest_ref[0, 0, head : head + 1, :], 0)
        inverse = jnp.where(self.valid_row, inverse_ref[0, 0, head : head + 1, :], 0)
        return jnp.exp(scores - largest) * inverse


def _normaliser_kernel(q_ref, k_ref, *rest, **static):
    *bias_refs, largest_ref, inverse_ref = rest
    block = _Block(q_ref, k_ref, bias_refs, **static)

    @pl.when(block.first)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
        inverse_ref[...] = jnp.zeros_like(inverse_ref)

    for head, group, member in block.heads():
        row = slice(head, head + 1)
        scores = block.scores(head, group, block.query(group, member))
        before = largest_ref[0, 0, row, :]
        largest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        shift = jnp.where(largest == -jnp.inf, 0, largest)  # a bias may be -inf for all keys so far
        total = inverse_ref[0, 0, row, :] * jnp.exp(before - shift)
        inverse_ref[0, 0, row, :] = total + jnp.sum(jnp.exp(scores - shift), axis=0, keepdims=True)
        largest_ref[0, 0, row, :] = largest

    @pl.when(block.last)
    def _():
        inverse_ref[...] = 1 / inverse_ref[...]


def _attend_kernel(threshold_ref, q_ref, k_ref, v_ref, largest_ref, inverse_ref, *rest, **static):
    *bias_refs, out_ref, kept_ref, masked_ref, sum_ref = rest
    block, layout = _Block(q_ref, k_ref, bias_refs, **static), static["layout"]
    threshold = threshold_ref[0, 0]

    @pl.when(block.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        kept_ref[...] = jnp.zeros_like(kept_ref)

    total = jnp.zeros((1, 1), jnp.float32)
    for head, group, member in block.heads():
        scores = block.scores(head, group, block.query(group, member))
        weights = block.weights(scores, head, largest_ref, inverse_ref)
        keep = is_kept(weights, threshold)
        masked_ref[head] = jnp.where(keep, weights, 0).astype(masked_ref.dtype)
        total += jnp.sum(jnp.sum(keep.astype(jnp.float32), axis=0, keepdims=True), axis=1, keepdims=True)
    # Rounding can lift a weight above 1, so an empty mask has to be said rather than computed.
    total = jnp.where(threshold < 1, total, 0)
    kept_ref[0, 0, 0] += jnp.broadcast_to(total, (1, LANES))

    @pl.when(jnp.max(total) > 0)
    def _():
        for head, group, member in block.heads():
            values = block.keys_of(v_ref, layout.value_lanes(group))
            attended = block.dot(values, masked_ref[head], TN)
            rows = layout.value_lanes(group)
            sum_ref[rows] += jnp.where(rows_of_head(member, layout.value_dim, attended.shape), attended, 0)

    @pl.when(block.last)
    def _():
        out_ref[0] = jnp.transpose(sum_ref[...]).astype(out_ref.dtype)


def _query_gradient_kernel(
    threshold_ref, q_ref, k_ref, v_ref, cotangent_ref, out_ref, largest_ref, inverse_ref, kept_ref, *rest, **static
):
    bias_refs, rest = (rest[:1], rest[1:]) if static["has_bias"] else ((), rest)
    dq_ref, *d_bias_refs, sum_ref = rest
    block, layout = _Block(q_ref, k_ref, bias_refs, **static), static["layout"]

    @pl.when(block.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for d_bias_ref in d_bias_refs:
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    @pl.when(jnp.max(kept_ref[0, 0, 0]) > 0)
    def _():
        for head, group, member in block.heads():
            weights = block.weights(
                block.scores(head, group, block.query(group, member)), head, largest_ref, inverse_ref
            )
            values, keys = layout.value_lanes(group), layout.key_lanes(group)
            cotangent = of_head(block.queries_of(cotangent_ref, values), member, layout.value_dim)
            out, v = block.queries_of(out_ref, values), block.keys_of(v_ref, values)
            masked = jnp.where(is_kept(weights, threshold_ref[0, 0]), weights, 0)
            d_scores = d_scores_of(block.dot, weights, masked, v, cotangent, out)
            d_query = block.dot(block.keys_of(k_ref, keys), d_scores, TN)
            sum_ref[keys] += jnp.where(rows_of_head(member, layout.key_dim, d_query.shape), d_query, 0)
            for d_bias_ref in d_bias_refs:
                d_bias_ref[0, head] = d_scores.astype(d_bias_ref.dtype)

    @pl.when(block.last)
    def _():
        dq_ref[0] = jnp.transpose(sum_ref[...] * block.scale).astype(dq_ref.dtype)


def _key_gradient_kernel(
    threshold_ref, q_ref, k_ref, v_ref, cotangent_ref, out_ref, largest_ref, inverse_ref, kept_ref, *rest, **static
):
    *bias_refs, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = rest
    block, layout = _Block(q_ref, k_ref, bias_refs, **static), static["layout"]

    @pl.when(block.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(jnp.max(kept_ref[0, 0, 0]) > 0)
    def _():
        for head, group, member in block.heads():
            query = block.query(group, member)
            weights = block.weights(block.scores(head, group, query), head, largest_ref, inverse_ref)
            values, keys = layout.value_lanes(group), layout.key_lanes(group)
            cotangent = of_head(block.queries_of(cotangent_ref, values), member, layout.value_dim)
            out, v = block.queries_of(out_ref, values), block.keys_of(v_ref, values)
            masked = jnp.where(is_kept(weights, threshold_ref[0, 0]), weights, 0)
            d_scores = d_scores_of(block.dot, weights, masked, v, cotangent, out)
            dv_sum_ref[:, values] += block.dot(masked, cotangent, NN)
            dk_sum_ref[:, keys] += block.dot(d_scores, query, NN)

    @pl.when(block.last)
    def _():
        dk_ref[0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)
