"""The Pallas kernels, interpreted on the CPU, against the plain operations; and compiled for every TPU there is.

"whole" are the kernels that hold whole sequences in fast memory, "blocks" those for more tokens than fit there, made to
work on few by small blocks.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castling_jax import ops
from castling_jax.compile_report.compile import LIBTPU_ENVIRONMENT
from castling_jax.ops.bias import dense_bias
from castling_jax.ops.tpu import attention as kernels
from castling_jax.ops.tpu import layout, linear_angular_blocks, masked_softmax, masked_softmax_blocks
from castling_jax.ops.tpu.factors import join_factors
from tests.ops import reference, rounding

# (batch, queries, keys, heads, key_dim, value_dim): DeiT's, LeViT's and MViTv2's heads, tokens that no block divides.
SHAPES = [
    (2, 17, 17, 2, 64, 64),
    (1, 52, 52, 4, 16, 32),
    (1, 21, 21, 3, 96, 96),
    (1, 40, 40, 1, 128, 128),
    (1, 33, 70, 2, 32, 128),
    (1, 20, 20, 6, 32, 64),  # heads that do not fill the registers evenly
]
# Of the output, and of gradients: float32 in two orders of summation, over up to 70 tokens and 128 channels one after
# the other, 2^-24 of each sum's terms; gradients go through two or three such products more, and cancel.
FLOAT32 = (1e-5, 1e-4)
# Operands of the products and the results are rounded to 8 bits, 2^-9 each; a gradient goes through four such steps.
BFLOAT16 = (2e-2, 4e-2)


@pytest.fixture(autouse=True, params=["whole", "blocks"])
def kind(request, monkeypatch):
    """Every test here is of both kinds of kernels."""
    use_small_blocks(monkeypatch, request.param)
    return request.param


def use_small_blocks(monkeypatch, kind):
    if kind == "blocks":
        monkeypatch.setattr(kernels, "fast_memory_bytes", lambda: 0)
    monkeypatch.setattr(linear_angular_blocks, "TOKEN_BLOCK", 32)
    monkeypatch.setattr(masked_softmax_blocks, "QUERY_BLOCK", 32)
    monkeypatch.setattr(masked_softmax_blocks, "KEY_BLOCK", 16)
    monkeypatch.setattr(masked_softmax, "KEY_CHUNK", 16)
    monkeypatch.setattr(masked_softmax, "QUERY_BLOCK", 16)
    monkeypatch.setattr(masked_softmax, "MAX_SINGLE_BLOCK", 32)


def draw(shape, dtype=jnp.float32, scale=1.0, seed=0):
    """q, k, v, taps, query_values (None where queries are keys), and the output's cotangent."""
    batch, queries, keys, heads, key_dim, value_dim = shape
    random = [jax.random.fold_in(jax.random.key(seed), i) for i in range(6)]
    q = scale * jax.random.normal(random[0], (batch, queries, heads, key_dim))
    k = scale * jax.random.normal(random[1], (batch, keys, heads, key_dim))
    v = jax.random.normal(random[2], (batch, keys, heads, value_dim))
    cotangent = jax.random.normal(random[3], (batch, queries, heads, value_dim))
    taps = jax.random.normal(random[4], (9, heads))
    own = jax.random.normal(random[5], cotangent.shape).astype(dtype) if queries != keys else None
    return *(x.astype(dtype) for x in (q, k, v)), taps, own, cotangent.astype(dtype)


@functools.cache
def both_attentions(implementation, kind):
    """(q, k, v, taps, query_values, biases, threshold, cotangent) -> (output, density, all gradients), compiled once.

    `kind` is there for the cache: what a kernel works on at once is read while it is traced.
    """

    @jax.jit
    def compute(q, k, v, taps, own, biases, threshold, cotangent):
        def attention(q, k, v, taps, own, biases):
            bias = None if biases is None else biases[0] if len(biases) == 1 else tuple(biases)
            return ops.castling_attention(
                q, k, v, taps, mask_threshold=threshold, bias=bias, query_values=own, implementation=implementation
            )

        out, pullback, density = jax.vjp(attention, q, k, v, taps, own, biases, has_aux=True)
        return out, density, pullback(cotangent)

    return compute


def assert_close(actual, expected, tolerances, rows=None):
    """Output (of some rows), and all gradients, each relative to its own scale."""

    def check(actual, expected, tolerance):
        scale = max(float(jnp.max(jnp.abs(expected))), 1e-30)
        np.testing.assert_allclose(actual.astype(jnp.float32) / scale, expected / scale, atol=tolerance)

    (out, _, gradients), (expected_out, _, expected_gradients) = actual, expected
    rows = ... if rows is None else rows
    check(out[rows], expected_out[rows], tolerances[0])
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    jax.tree.map(lambda one, other: check(one, other, tolerances[1]), gradients, expected_gradients)


def compare(kind, shape, threshold, *, scale=1.0, seed=0, dtype=jnp.float32, bias=None, tolerances=FLOAT32):
    """Both implementations on one draw; rows whose weights come near the threshold are left out of all of it."""
    q, k, v, taps, own, cotangent = draw(shape, dtype, scale, seed)
    biases = draw_bias(shape, bias)
    wide = [np.asarray(x, np.float64) for x in (q, k)]
    dense = None if biases is None else tuple(np.asarray(x, np.float64) for x in biases)
    weights = reference.softmax(reference.scaled_scores(*wide, dense[0] if dense and len(dense) == 1 else dense))
    # float32 scores of size s move a weight by some s * 2^-24 of itself; a cotangent of zero takes a row out of the
    # gradients.
    near = np.any(np.abs(weights - threshold) < 1e-4 * threshold, axis=3)
    clear = np.moveaxis(~near, 1, 2)
    assert clear.mean() > 0.5
    cotangent = cotangent * clear[..., None].astype(cotangent.dtype)
    arguments = (q, k, v, taps, own, biases)
    actual = both_attentions("pallas", kind)(*arguments, jnp.float32(threshold), cotangent)
    expected = both_attentions("xla", None)(
        *jax.tree.map(lambda x: x.astype(jnp.float32), arguments),
        jnp.float32(threshold),
        cotangent.astype(jnp.float32),
    )
    assert_close(actual, expected, tolerances, np.nonzero(clear))
    if clear.all():
        assert float(actual[1]) == pytest.approx(float(expected[1]), abs=1e-7)


def draw_bias(shape, bias):
    batch, queries, keys, heads = shape[:4]
    sizes = {
        None: [],
        "shared": [(1, keys)],
        "each": [(batch, keys)],
        "factored": [(batch, keys // 5), (batch, 5)],
        "factored, one shared": [(1, keys // 5), (batch, 5)],
    }
    return [
        jax.random.normal(jax.random.key(7 + width), (rows, heads, queries, width)) for rows, width in sizes[bias]
    ] or None


@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 9, 20, 2, 32, 64), SHAPES[5]))]
)
def test_agrees_with_the_plain_operations(kind, shape):
    compare(kind, shape, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        *(((2, 33, 20, 2, 16, 64), bias) for bias in ("shared", "each", "factored", "factored, one shared")),
        *(((1, 12, 20, 12, 16, 32), bias) for bias in ("shared", "factored")),
    ],
)
def test_bias(kind, shape, bias):
    compare(kind, shape, 0.1, bias=bias)


@pytest.mark.slow
def test_several_steps_along_the_heads(kind, monkeypatch):
    if kind == "blocks":
        pytest.skip("as many as fit in the kernels of whole sequences")
    monkeypatch.setattr(layout, "BLOCK_BYTES", 1)
    compare("steps", (1, 11, 20, 4, 64, 64), 0.1, bias="factored")


@pytest.mark.slow
# The fixture sets sizes that are the same for all examples.
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    threshold=st.sampled_from([0.0, 1e-6, 0.02, 0.5, 1.0, 3.0]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_sweep(kind, shape, threshold, scale, seed):
    compare(kind, shape, threshold, scale=scale, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_within_its_rounding(kind, shape):
    # At threshold 0 there is nothing to fall to the other side of it.
    compare(kind, shape, 0.0, dtype=jnp.bfloat16, tolerances=BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linear", "castling"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_agrees_with_the_authors_block(golden, number, form):
    file = golden(f"official_attention_{number}_{form}")
    weights, heads = file.group("weights"), file.meta["num_heads"]

    def block(weights, x):
        qkv = x @ weights["qkv.weight"].T + weights.get("qkv.bias", 0)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), 2, 0)
        taps = weights["dconv.weight"][:, 0, :, 0].T
        if form == "linear":
            out = ops.linear_angular_attention(q, k, v, taps, implementation="pallas")
        else:
            threshold = jnp.float32(file.meta["threshold"])
            out, _ = ops.castling_attention(q, k, v, taps, mask_threshold=threshold, implementation="pallas")
        return out.reshape(x.shape) @ weights["proj.weight"].T + weights["proj.bias"]

    @jax.jit
    def run(weights, x, cotangent):
        out, pullback = jax.vjp(block, weights, x)
        return out, *pullback(cotangent)

    out, gradients, grad_input = run(weights, file["input"], file["cotangent"])
    expected = file.group("grads") | {"output": file["output"], "input": file["grad_input"]}
    for name, actual in (gradients | {"output": out, "input": grad_input}).items():
        tolerance = FLOAT32[0] if name == "output" else FLOAT32[1]
        np.testing.assert_allclose(actual, expected[name], rtol=0, atol=tolerance * np.max(np.abs(expected[name])))


def test_weight_on_the_threshold_is_masked_forward_and_backward():
    _, k, v, _, _, cotangent = draw((1, 8, 16, 2, 64, 64))
    q = jnp.zeros((1, 8, 2, 64))  # every weight is exactly 1/16

    def attention(threshold):
        return lambda v: ops.masked_softmax_attention(
            q, k, v, mask_threshold=jnp.float32(threshold), implementation="pallas"
        )

    (out, density), pullback = jax.vjp(attention(1 / 16), v)
    assert density == 0
    assert not jnp.any(out)
    assert not jnp.any(pullback((cotangent, jnp.float32(0)))[0])
    assert attention(np.nextafter(np.float32(1 / 16), np.float32(0)))(v)[1] == 1


@pytest.mark.parametrize("with_taps", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_zero_vectors_do_not_explode_the_gradients(kind, dtype, with_taps):
    q, k, v, taps, _, cotangent = draw((1, 7, 7, 2, 64, 64), dtype)
    q, k, v = rounding.with_zeros(q, k, v)
    cotangent = jnp.repeat(cotangent, len(q), axis=0)
    arguments = q, k, v, taps if with_taps else None, None, None
    # At threshold 0 no weight is near it. At 1 the mask is empty, so the output's core is zero where q and v are.
    for threshold in (0.0, 1.0):
        actual, expected = (
            both_attentions(*which)(*arguments, jnp.float32(threshold), cotangent)
            for which in (("pallas", kind), ("xla", None))
        )
        rounding.assert_zeros_do_not_explode(actual[2][:3])
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), expected)
        assert_close(actual, wide, FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_vectors_pass_no_gradient_of_their_own(dtype):
    q, k, v, taps, _, cotangent = draw((1, 7, 7, 2, 64, 64), dtype)
    q, k, v = rounding.with_zeros(q, k, v)
    attention = functools.partial(ops.linear_angular_attention, implementation="pallas")
    for kernel in (None, taps):
        _, pullback = jax.vjp(lambda q, k, v, kernel=kernel: attention(q, k, v, kernel), q, k, v)
        gradients = pullback(jnp.repeat(cotangent, len(q), axis=0))
        rounding.assert_zeros_do_not_explode(gradients)
        rounding.assert_zeros_pass_nothing((q, k), gradients[:2])


@pytest.mark.parametrize("norm", [1e-9, 1e-3, 1e15])
def test_the_norm_of_queries_and_keys_does_not_matter(norm):
    """Forward, of any norm; the gradient scales with its inverse."""
    q, k, v, taps, _, cotangent = draw((1, 9, 9, 2, 64, 64))
    unit_q, unit_k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    attention = functools.partial(ops.linear_angular_attention, implementation="pallas")

    def compute(q, k):
        out, pullback = jax.vjp(lambda q, k: attention(q, k, v, taps), q, k)
        return out, None, pullback(cotangent)

    out, _, gradients = compute(norm * unit_q, norm * unit_k)
    assert_close((out, None, jax.tree.map(lambda x: norm * x, gradients)), compute(unit_q, unit_k), FLOAT32)


def test_nan_is_seen():
    q, k, v, *_ = draw((1, 12, 12, 2, 64, 64))
    broken = q.at[0, 3, 1, 5].set(jnp.nan)
    out, _ = ops.masked_softmax_attention(broken, k, v, mask_threshold=jnp.float32(0.02), implementation="pallas")
    assert jnp.isnan(out[0, 3, 1]).all()
    assert jnp.isfinite(out[0, 4:]).all()


@pytest.mark.slow
def test_jit_and_vmap():
    q, k, v, taps, _, _ = draw((4, 12, 12, 2, 64, 64))

    def attention(q, k, v, implementation):
        return ops.castling_attention(q, k, v, taps, mask_threshold=jnp.float32(0.02), implementation=implementation)[0]

    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    mapped = jax.jit(jax.vmap(lambda q, k, v: attention(q, k, v, "pallas")))(*split)
    np.testing.assert_allclose(mapped.reshape(v.shape), attention(q, k, v, "xla"), atol=1e-5)

    def gradients(implementation):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attention(*x, implementation))), (0, 1, 2))

    of_parts, expected = (jax.jit(jax.vmap(gradients(name)))(*split) for name in ("pallas", "xla"))
    for one, other in zip(of_parts, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.max(jnp.abs(other))))


@pytest.mark.parametrize("factored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_keys_that_a_bias_takes_out(factored):
    """-inf for some keys, a first block of them and more, as padding is masked."""
    q, k, v, *_ = draw((2, 17, 40, 2, 16, 32))
    columns = jnp.zeros((1, 2, 17, 8)).at[..., 6:].set(-jnp.inf)
    bias = (jnp.zeros((1, 2, 17, 5)).at[..., :3].set(-jnp.inf), columns)
    bias = bias if factored else dense_bias(bias)
    run = functools.partial(ops.masked_softmax_attention, mask_threshold=0.05, bias=bias)
    out, density = run(q, k, v, implementation="pallas")
    expected, expected_density = run(q, k, v, implementation="xla")
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert density == expected_density


@pytest.mark.filterwarnings("error")
def test_a_factor_in_float16_takes_keys_out_too():
    """-1e30, which stands for -inf, is -inf in float16."""
    factor = jnp.full((1, 2, 3, 4), -jnp.inf, jnp.float16)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert jnp.isfinite(join_factors(factor, factor, 1, dtype)).all()


def test_float32_under_x64(kind):
    q, k, v, taps, *_ = draw((1, 9, 9, 2, 16, 16))
    run = functools.partial(ops.castling_attention, mask_threshold=0.1)
    expected = run(q, k, v, taps)
    with jax.enable_x64(True):
        found = jax.jit(run)(q, k, v, taps)
        if kind == "whole":  # the others' blocks are too small here
            jax.jit(run).trace(q, k, v, taps).lower(lowering_platforms=("tpu",))
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)


def test_a_shard_map_that_checks_what_varies_has_the_plain_operations(refuses):
    q, k, v, taps, *_ = draw((2, 9, 9, 2, 16, 16))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def over_mesh(implementation):
        run = functools.partial(ops.castling_attention, mask_threshold=0.1, implementation=implementation)
        parts = jax.P("data")
        return jax.jit(
            jax.shard_map(lambda *x: run(*x)[0], mesh=mesh, in_specs=(parts, parts, parts, jax.P()), out_specs=parts)
        )(q, k, v, taps)

    expected, _ = ops.castling_attention(q, k, v, taps, mask_threshold=0.1)
    np.testing.assert_allclose(over_mesh("auto"), expected, rtol=0, atol=1e-5)
    with refuses("the kernels run in a jax.shard_map only with check_vma=False"):
        over_mesh("pallas")


def test_auto_on_a_cpu_is_the_plain_operation():
    q, k, v, taps, _, cotangent = draw(SHAPES[0])
    arguments = q, k, v, taps, None, None, jnp.float32(0.02), cotangent
    auto, xla = (both_attentions(name, None)(*arguments) for name in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, auto, xla)


def test_dtypes_that_differ_are_not_served(refuses):
    q, k, v, *_ = draw(SHAPES[0])
    with refuses("one dtype, float32 or bfloat16, not in bfloat16 and float32", 'use implementation="xla"'):
        ops.linear_angular_attention(q, k, v.astype(jnp.bfloat16), implementation="pallas")
    assert ops.linear_angular_attention(q, k, v.astype(jnp.bfloat16), implementation="auto").dtype == jnp.bfloat16


def test_a_gpu_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v, *_ = draw(SHAPES[0])
    with refuses("this is a GPU", 'use implementation="xla"'):
        ops.linear_angular_attention(q, k, v, implementation="pallas")
    with refuses("this is a GPU", 'use implementation="xla"'):
        ops.masked_softmax_attention(q, k, v, mask_threshold=0.1, implementation="pallas")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "shape", "prefix_tokens"),
    [
        ((3, 3), (2, 16, 49, 2, 32, 64), 0),  # queries on some of the keys' tokens
        pytest.param((3, 3), (2, 49, 49, 2, 32, 64), 0, marks=pytest.mark.slow),
        pytest.param((9,), (2, 16, 49, 2, 32, 64), 1, marks=pytest.mark.slow),
        pytest.param((3, 3), (1, 16, 60, 3, 16, 64), 0, marks=pytest.mark.slow),  # on others
        pytest.param((1, 5), (2, 15, 15, 2, 16, 16), 0, marks=pytest.mark.slow),
        ((7, 5), (2, 4, 4, 2, 16, 16), 0),  # farther than the grid goes
        pytest.param((5, 3), (1, 27, 27, 2, 64, 64), 2, marks=pytest.mark.slow),
        pytest.param((19,), (1, 70, 70, 2, 64, 64), 0, marks=pytest.mark.slow),
    ],
)
def test_token_kernels(sizes, shape, prefix_tokens):
    grids = {49: (7, 7), 16: (4, 4), 15: (5, 3), 4: (2, 2), 27: (5, 5)}
    grid = grids[shape[1]] if len(sizes) == 2 else None
    q, k, v, _, own, cotangent = draw(shape)
    tokens = np.arange(49).reshape(7, 7)[::2, ::2].ravel() if shape[2] == 49 != shape[1] else None
    own = own if tokens is None else None
    kernel = jax.random.normal(jax.random.key(9), (*sizes, shape[3]))

    @functools.partial(jax.jit, static_argnames="implementation")
    def compute(*arguments, implementation):
        def attention(q, k, v, kernel, own):
            return ops.linear_angular_attention(
                *(q, k, v, kernel),
                query_values=own if tokens is None else tokens,
                grid=grid,
                prefix_tokens=prefix_tokens,
                implementation=implementation,
            )

        out, pullback = jax.vjp(attention, *arguments)
        return out, None, pullback(cotangent)

    arguments = q, k, v, kernel, own
    actual = compute(*arguments, implementation="pallas")
    assert_close(actual, compute(*arguments, implementation="xla"), FLOAT32)
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, k, v))
    wide_own = wide_v if own is None else np.asarray(own, np.float64)
    wide_own = wide_own if tokens is None else wide_v[:, tokens]
    expected = reference.linear_angular(wide_q, wide_k, wide_v, query_values=wide_own)
    patches = wide_own[:, prefix_tokens:]
    expected[:, prefix_tokens:] += (
        reference.convolve_tokens(patches, kernel) if grid is None else reference.convolve_grid(patches, kernel, grid)
    )
    # Sums of up to 35 products of numbers up to about 4.
    np.testing.assert_allclose(actual[0], expected, rtol=0, atol=1e-4)


def mesh_of(data, tensor):
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.AbstractMesh((data, tensor), ("data", "tensor"), axis_types=axes)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((4, 1), "splits the batch into 4 parts (its axes data)"),
        ((1, 4), "splits the heads into 4 parts (its axes tensor)"),
    ],
)
def test_a_mesh_that_does_not_divide(refuses, mesh, message):
    arrays = [jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.float32)] * 3

    def attention(implementation):
        return lambda *x: ops.linear_angular_attention(*x, implementation=implementation)

    with jax.sharding.use_abstract_mesh(mesh_of(*mesh)):
        with refuses(message, "2 is not a multiple of 4"):
            jax.eval_shape(attention("pallas"), *arrays)
        assert jax.eval_shape(attention("auto"), *arrays).shape == (2, 8, 2, 64)


COMPILE = """
    import sys
    import jax, numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from castling_jax import ops
    from castling_jax.models.levit import every_second
    topology, data, tensor, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[: data * tensor]).reshape(data, tensor), ("data", "tensor"),
                axis_types=(AxisType.Auto,) * 2)
    split, whole = P("data", None, "tensor", None), P()
    for queries, keys, heads, key_dim, value_dim, dtype, bias, grid in cases:
        levit = bias == "shared"  # the kernels do its batch norms and its Hardswish
        def step(q, k, v, taps, own, biases, norms, threshold, cotangent):
            def attention(q, k, v, taps, own, biases, norms):
                bias = None if biases is None else biases[0] if len(biases) == 1 else biases
                return ops.castling_attention(
                    q, k, v, taps, mask_threshold=threshold, bias=bias, grid=grid,
                    around=ops.Around(norms, "hard_swish") if levit else ops.Around(),
                    query_values=every_second((14, 14)) if (queries, keys) == (49, 196) else own)
            out, pullback, density = jax.vjp(attention, q, k, v, taps, own, biases, norms, has_aux=True)
            return out, density, pullback(cotangent)
        def array(spec, *shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        q, out = (array(split, 2 * data, queries, heads, dim) for dim in (key_dim, value_dim))
        k, v = (array(split, 2 * data, keys, heads, dim) for dim in (key_dim, value_dim))
        taps = (9,) if grid is None else (3, 3)
        taps = array(P(*[None] * len(taps), "tensor"), *taps, heads, dtype="float32")
        sizes = {None: None, "shared": [(1, keys)], "factored": [(2 * data, 7), (2 * data, keys // 7)]}[bias]
        biases = sizes and [array(P(None if rows == 1 else "data", "tensor"), rows, heads, queries, width)
                            for rows, width in sizes]
        own = out if queries != keys else None
        norms = [array(P(None, "tensor"), 3, heads, dim, dtype="float32") for dim in (key_dim, key_dim, value_dim)]
        norms = tuple(norms) if levit else None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(step).lower(q, k, v, taps, own, biases, norms, array(whole, dtype="float32"), out)
        text = lowered.compile().as_text()
        assert text.count("tpu_custom_call") >= 4, text
        assert "all-gather" not in text, text
        print(queries, keys, heads, key_dim, value_dim, dtype, bias, grid)
"""


def compile_for(topology, data, model, cases):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), topology, str(data), str(model), repr(cases)],
        env=os.environ | LIBTPU_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("\n") == len(cases)


LEVIT = (49, 196, 4, 16, 64, "bfloat16", "shared", (7, 7))  # its subsampling attention
CASES = [
    (197, 197, 2, 64, 64, "bfloat16", None, None),
    LEVIT,
    (49, 49, 9, 32, 64, "bfloat16", "shared", (7, 7)),  # heads that do not fill the registers evenly
    (196, 49, 1, 96, 96, "bfloat16", "factored", (14, 14)),
    (2048, 2048, 2, 64, 64, "float32", None, None),  # in blocks
]


# Few heads: their number makes the programs longer, and compiling slower, but not different.
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for(topology, kind):
    if kind == "blocks":
        pytest.skip("the kind follows from the sizes here")
    more = [
        (50, 50, 4, 32, 128, "bfloat16", None, None),
        (100, 100, 1, 128, 128, "float32", None, None),
        (1025, 1025, 2, 64, 64, "bfloat16", None, None),
        (3136, 49, 1, 96, 96, "bfloat16", "factored", (56, 56)),
        (16384, 16384, 2, 64, 64, "bfloat16", None, (128, 128)),
    ]
    compile_for(topology, 1, 1, CASES + (more if topology == "v5e:2x2" else []))


@pytest.mark.slow
def test_kernels_compile_under_a_mesh_of_batch_and_heads(kind):
    if kind == "blocks":
        pytest.skip("the kind follows from the sizes here")
    compile_for("v5e:2x4", 4, 2, [(197, 197, 4, 64, 64, "bfloat16", None, None), LEVIT])
