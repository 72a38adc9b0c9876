"""The Pallas kernels, interpreted on the CPU, against the plain operations; and compiled for every TPU there is."""

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

from castling_jax import ops

# (batch, queries, keys, heads, key_dim, value_dim): DeiT's, LeViT's and MViTv2's heads, tokens that no block divides.
SHAPES = [
    (2, 17, 17, 2, 64, 64),
    (1, 50, 50, 4, 16, 32),
    (2, 21, 21, 6, 32, 64),
    (1, 30, 30, 2, 96, 96),
    (1, 9, 9, 1, 128, 128),
]


def draw(shape, dtype=jnp.float32, scale=1.0):
    batch, queries, keys, heads, key_dim, value_dim = shape
    random = [jax.random.key(seed) for seed in range(5)]
    q = scale * jax.random.normal(random[0], (batch, queries, heads, key_dim))
    k = scale * jax.random.normal(random[1], (batch, keys, heads, key_dim))
    v = jax.random.normal(random[2], (batch, keys, heads, value_dim))
    cotangent = jax.random.normal(random[3], (batch, queries, heads, value_dim))
    taps = jax.random.normal(random[4], (9, heads))
    return *(x.astype(dtype) for x in (q, k, v)), taps, cotangent.astype(dtype)


def with_gradients(function):
    """(arguments, cotangent) -> (output, gradients of all arguments), compiled as one."""

    @jax.jit
    def compute(arguments, cotangent):
        out, pullback = jax.vjp(function, *arguments)
        return out, pullback(cotangent)

    return compute


def assert_close(actual, expected, tolerances):
    """Outputs and all gradients, each relative to its own scale."""

    def check(actual, expected, tolerance):
        scale = max(float(jnp.max(jnp.abs(expected))), 1e-30)
        np.testing.assert_allclose(actual.astype(jnp.float32) / scale, expected / scale, atol=tolerance)

    check(actual[0], expected[0], tolerances[0])
    for one, other in zip(actual[1], expected[1], strict=True):
        check(one, other, tolerances[1])


def assert_same(kernel, plain, arguments, cotangent, tolerances):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangent))
    assert_close(with_gradients(kernel)(arguments, cotangent), with_gradients(plain)(*wide), tolerances)


FLOAT32 = (1e-5, 1e-4)
# Operands of the products and the results are rounded to 8 bits, 2^-9 each; a gradient goes through four such steps.
BFLOAT16 = (2e-2, 4e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_taps", [True, False])
def test_linear_angular_attention(shape, with_taps):
    q, k, v, taps, cotangent = draw(shape)
    arguments = (q, k, v, taps) if with_taps else (q, k, v)
    assert_same(
        lambda *x: ops.linear_angular_attention(*x, implementation="pallas"),
        lambda *x: ops.linear_angular_attention(*x, implementation="xla"),
        arguments,
        cotangent,
        FLOAT32,
    )


@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 40, 2, 64, 64), (2, 5, 13, 3, 16, 64)])
@pytest.mark.parametrize("bias", [None, "shared", "each", "factored"])
def test_masked_softmax_attention(shape, bias):
    threshold = 0.1
    if bias == "factored" and shape[2] % 3:
        pytest.skip("these keys are no grid of three columns")
    q, k, v, _, cotangent = draw(shape)
    batch, queries, keys, heads = shape[:4]
    sizes = {"shared": [(1, keys)], "each": [(batch, keys)], "factored": [(batch, keys // 3), (batch, 3)]}
    biases = [
        jax.random.normal(jax.random.key(7 + width), (rows, heads, queries, width))
        for rows, width in sizes.get(bias, [])
    ]

    def attention(q, k, v, *biases, implementation):
        given = None if not biases else biases[0] if len(biases) == 1 else biases
        return ops.masked_softmax_attention(
            q, k, v, mask_threshold=jnp.float32(threshold), bias=given, implementation=implementation
        )

    # No weight of these draws is near enough to the threshold for rounding to move it across.
    densities = [float(attention(q, k, v, *biases, implementation=name)[1]) for name in ("pallas", "xla")]
    assert densities[0] == pytest.approx(densities[1], abs=1e-7)
    assert_same(
        lambda *x: attention(*x, implementation="pallas")[0],
        lambda *x: attention(*x, implementation="xla")[0],
        (q, k, v, *biases),
        cotangent,
        FLOAT32,
    )


@functools.cache
def castling(implementation):
    """Compiled once for all thresholds: the threshold is the last argument."""
    return with_gradients(
        lambda q, k, v, taps, threshold: ops.castling_attention(
            q, k, v, taps, mask_threshold=threshold, implementation=implementation
        )[0]
    )


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.02, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_castling_attention(threshold, scale):
    q, k, v, taps, cotangent = draw((2, 19, 19, 3, 64, 64), scale=scale)
    if scale == 5.0 and threshold == 1e-6:
        pytest.skip("with weights this spread out some lie on the threshold")
    arguments = (q, k, v, taps, jnp.float32(threshold))
    assert_close(castling("pallas")(arguments, cotangent), castling("xla")(arguments, cotangent), FLOAT32)


def test_bfloat16_within_its_rounding():
    q, k, v, taps, cotangent = draw((2, 40, 40, 2, 64, 64), jnp.bfloat16)

    def attention(implementation):
        # At threshold 0 there is nothing to fall to the other side of it.
        return lambda q, k, v, taps: ops.castling_attention(
            q, k, v, taps, mask_threshold=jnp.float32(0), implementation=implementation
        )[0]

    assert_same(attention("pallas"), attention("xla"), (q, k, v, taps), cotangent, BFLOAT16)


def test_weight_on_the_threshold_is_masked_forward_and_backward():
    _, k, v, _, cotangent = draw((1, 8, 16, 2, 64, 64))
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


def test_zero_vectors_give_finite_values_and_gradients():
    zeros = jnp.zeros((1, 8, 2, 64))

    def attention(q, k, v):
        return ops.castling_attention(q, k, v, mask_threshold=jnp.float32(0.02), implementation="pallas")[0]

    out, pullback = jax.vjp(attention, zeros, zeros, zeros)
    for array in (out, *pullback(jnp.ones_like(out))):
        assert jnp.isfinite(array).all()


def test_jit_and_vmap():
    q, k, v, taps, _ = draw((4, 12, 12, 2, 64, 64))

    def attention(q, k, v, implementation):
        return ops.castling_attention(q, k, v, taps, mask_threshold=jnp.float32(0.02), implementation=implementation)[0]

    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    mapped = jax.jit(jax.vmap(lambda q, k, v: attention(q, k, v, "pallas")))(*split)
    np.testing.assert_allclose(mapped.reshape(v.shape), attention(q, k, v, "xla"), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtypes", "message"),
    [
        ((1, 20000, 20000, 1, 64, 64), ("float32",) * 3, "20000 keys are too many"),
        ((1, 8, 8, 1, 64, 64), ("float32", "float32", "bfloat16"), "one for all, not bfloat16, float32"),
    ],
)
def test_what_the_kernels_do_not_serve(refuses, shape, dtypes, message):
    arrays = [
        jax.ShapeDtypeStruct(x.shape, dtype)
        for x, dtype in zip(jax.eval_shape(lambda: draw(shape))[:3], dtypes, strict=True)
    ]
    with refuses(message, 'use implementation="xla"'):
        jax.eval_shape(
            lambda q, k, v: ops.masked_softmax_attention(q, k, v, mask_threshold=0.1, implementation="pallas"), *arrays
        )


def test_queries_unlike_keys_are_not_served_by_the_linear_kernel(refuses):
    q, k, v, _, cotangent = draw((1, 8, 16, 2, 64, 64))
    with refuses("the same tokens", 'use implementation="xla"'):
        ops.linear_angular_attention(q, k, v, query_values=cotangent, implementation="pallas")


TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COMPILE = """
    import sys
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from castling_jax import ops
    topology, data, model, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(__import__("numpy").array(devices[: data * model]).reshape(data, model), ("data", "model"),
                axis_types=(AxisType.Auto,) * 2)
    heads_split, whole = P("data", None, "model", None), P()
    for tokens, heads, key_dim, value_dim, dtype in cases:
        def attention(q, k, v, taps, threshold):
            out, density = ops.castling_attention(q, k, v, taps, mask_threshold=threshold, implementation="pallas")
            return out, jax.lax.pmean(density, ("data", "model"))
        split = jax.shard_map(attention, mesh=mesh, in_specs=(*(heads_split,) * 3, P(None, "model"), whole),
                              out_specs=(heads_split, whole), check_vma=False)
        def step(q, k, v, taps, threshold, cotangent):
            out, pullback, _ = jax.vjp(lambda *x: split(*x, threshold), q, k, v, taps, has_aux=True)
            return out, pullback(cotangent)
        def array(spec, *shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        q = array(heads_split, data, tokens, heads, key_dim)
        v = array(heads_split, data, tokens, heads, value_dim)
        taps = array(P(None, "model"), 9, heads, dtype="float32")
        text = jax.jit(step).lower(q, q, v, taps, array(whole, dtype="float32"), v).compile().as_text()
        assert text.count("tpu_custom_call") >= 4, text
        print(tokens, heads, key_dim, value_dim, dtype)
"""


def compile_for(topology, data, model, cases):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), topology, str(data), str(model), repr(cases)],
        env=os.environ | TPU_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("\n") == len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for(topology):
    cases = [
        (197, 12, 64, 64, "bfloat16"),
        (196, 4, 16, 32, "float32"),
        (49, 6, 16, 64, "bfloat16"),
        (50, 8, 32, 128, "bfloat16"),
        (196, 2, 96, 96, "bfloat16"),
        (100, 2, 128, 128, "float32"),
    ]
    compile_for(topology, 1, 1, cases)


@pytest.mark.slow
def test_kernels_compile_for_many_tokens():
    compile_for("v5e:2x2", 1, 1, [(3137, 12, 64, 64, "bfloat16")])


@pytest.mark.slow
def test_kernels_compile_under_a_mesh_of_batch_and_heads():
    compile_for("v5e:2x4", 4, 2, [(197, 12, 64, 64, "bfloat16")])
