"""The encoder block: its kernel, interpreted on the CPU, and its plain operations against NumPy in float64."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops
from castling_jax.compile_report.compile import LIBTPU_ENVIRONMENT
from castling_jax.ops.tpu import encoder_block, layout
from tests.ops import reference

# Shapes (batch, tokens, channels, heads, hidden): two images a grid step; a window of two heads and one of one head;
# heads that fill no register; an MLP in two chunks; tokens that one loop and a rest cover.
CASES = {
    "two images a step": ((4, 65, 64, 4, 256), (9,), None, 0),
    "taps over the grid": ((2, 50, 192, 3, 768), (3, 3), (7, 7), 1),
    "two prefix tokens, wide taps": ((3, 17, 48, 3, 100), (3, 5), (3, 5), 2),
    "no taps, two chunks": ((2, 12, 64, 4, 1000), None, None, 0),
    "many tokens": ((1, 270, 64, 1, 64), (5,), None, 0),
}
# float32: sums over up to 1,000 channels in another order, through six products one after the other.
FLOAT32 = 3e-6
# bfloat16: each factor of a product is rounded by 2^-9 of itself, in six products one after the other.
BFLOAT16 = 1e-2


def draw(shape, taps, *, bias=True, seed=0):
    batch, tokens, channels, heads, hidden = shape
    rng = np.random.default_rng(seed)

    def normal(*sizes, scale):
        return np.float32(scale * rng.normal(size=sizes))

    def dense(inputs, outputs):
        return normal(inputs, outputs, scale=1 / math.sqrt(inputs)), normal(outputs, scale=0.1)

    def norm():
        return 1 + normal(channels, scale=0.1), normal(channels, scale=0.1)

    qkv, qkv_bias = dense(channels, 3 * channels)
    token_kernel = None if taps is None else normal(*taps, heads, scale=0.3)
    weights = ops.BlockWeights(
        *norm(),
        *(qkv, qkv_bias if bias else None, token_kernel),
        *dense(channels, channels),
        *norm(),
        *dense(channels, hidden),
        *dense(hidden, channels),
    )
    return jax.tree.map(jnp.asarray, (normal(batch, tokens, channels, scale=1), weights))


def in_float64(x, weights, heads, grid, prefix):
    """The block as in the paper's figures, head by head, in NumPy."""
    x, w = jax.tree.map(np.float64, (x, weights))

    def norm(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

    qkv = norm(x, w.norm1_scale, w.norm1_bias) @ w.qkv_kernel + (0 if w.qkv_bias is None else w.qkv_bias)
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in np.split(qkv, 3, axis=2))
    out = reference.linear_angular(q, k, v, w.token_kernel if grid is None else None)
    if grid is not None:
        out[:, prefix:] += reference.convolve_grid(v[:, prefix:], w.token_kernel, grid)
    x = x + out.reshape(x.shape) @ w.proj_kernel + w.proj_bias
    hidden = norm(x, w.norm2_scale, w.norm2_bias) @ w.fc1_kernel + w.fc1_bias
    hidden *= 0.5 * np.vectorize(math.erfc)(-hidden / math.sqrt(2))
    return x + hidden @ w.fc2_kernel + w.fc2_bias


def difference(actual, expected):
    return np.max(np.abs(np.float64(actual) - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case, implementation, dtype):
    shape, taps, grid, prefix = CASES[case]
    x, weights = draw(shape, taps, bias=case != "no taps, two chunks")
    x = jnp.asarray(x, dtype)
    where = {"grid": grid, "prefix_tokens": prefix} if grid else {}
    out = ops.linear_angular_block(x, weights, num_heads=shape[3], implementation=implementation, **where)
    assert out.dtype == x.dtype
    tolerance = FLOAT32 if dtype == "float32" else BFLOAT16
    assert difference(out, in_float64(x, weights, shape[3], grid, prefix)) < tolerance


@pytest.mark.parametrize("needed", [pytest.param(1, marks=pytest.mark.slow), 2, 9])
@pytest.mark.parametrize("case", ["two images a step", "two prefix tokens, wide taps", "many tokens"])
def test_only_needed_tokens(case, needed):
    shape, taps, grid, prefix = CASES[case]
    x, weights = draw(shape, taps)
    where = {"grid": grid, "prefix_tokens": prefix} if grid else {}
    block = functools.partial(ops.linear_angular_block, num_heads=shape[3], needed_tokens=needed, **where)
    out = block(x, weights, implementation="pallas")
    assert out.shape == (x.shape[0], needed, x.shape[2])
    assert difference(out, in_float64(x, weights, shape[3], grid, prefix)[:, :needed]) < FLOAT32
    for name, dtype in (("xla", x.dtype), ("auto", x.dtype), ("auto", jnp.float16)):  # no kernel takes float16
        run = functools.partial(block, implementation=name)
        assert jax.eval_shape(run, x.astype(dtype), weights).shape == out.shape

    def loss(implementation, x):
        return jnp.sum(jnp.sin(block(x, weights, implementation=implementation)))

    one, other = (jax.grad(functools.partial(loss, name))(x) for name in ("pallas", "xla"))
    np.testing.assert_allclose(one, other, atol=3e-5 * np.abs(other).max())


def test_too_many_needed_tokens(refuses):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    with refuses("needed_tokens must be from 1 to 16, not 17"):
        ops.linear_angular_block(x, weights, num_heads=4, needed_tokens=17)


def test_gradients_are_those_of_the_plain_operations():
    shape, taps, *_ = CASES["two images a step"]
    x, weights = draw(shape, taps)

    def loss(implementation, x, weights):
        return jnp.sum(jnp.sin(ops.linear_angular_block(x, weights, num_heads=4, implementation=implementation)))

    both = [jax.grad(functools.partial(loss, name), (0, 1))(x, weights) for name in ("pallas", "xla")]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=3e-5 * np.abs(other).max()), *both)


def test_matrices_are_cast_where_only_these_fit(monkeypatch):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    x = jnp.bfloat16(x)
    positions = encoder_block.tap_positions(weights.token_kernel, None)
    needed = encoder_block.needed_bytes(x, weights, 4, positions)
    matrices = 2 * sum(getattr(weights, name).size for name in encoder_block.MATRICES)  # bytes in bfloat16
    monkeypatch.setattr(layout, "USUAL_FAST_MEMORY", needed - matrices)
    kept = encoder_block._that_fit(x, weights, 4, positions)
    assert {getattr(kept, name).dtype.name for name in encoder_block.MATRICES} == {"bfloat16"}


def test_too_little_fast_memory(refuses, monkeypatch):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    monkeypatch.setattr(layout, "USUAL_FAST_MEMORY", 2**16)
    with refuses("MiB of fast memory for 16 tokens of 64 channels", 'use implementation="xla"'):
        ops.linear_angular_block(x, weights, num_heads=4, implementation="pallas")
    ops.linear_angular_block(x, weights, num_heads=4, implementation="auto")


def test_too_many_tokens(refuses):
    x, weights = draw((1, 12, 64, 4, 64), (9,))
    x = jax.ShapeDtypeStruct((1, 20_000, 64), jnp.float32)
    with refuses("at most 787,200 numbers an image, not 20,000 tokens of 64 channels"):
        jax.eval_shape(lambda x: ops.linear_angular_block(x, weights, num_heads=4, implementation="pallas"), x)


def test_a_mesh_that_splits_heads(refuses):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        block = functools.partial(ops.linear_angular_block, num_heads=4)
        with refuses("the mesh splits the heads (its axes tensor)", "this kernel needs all"):
            jax.eval_shape(functools.partial(block, implementation="pallas"), x, weights)
        assert jax.eval_shape(block, x, weights).shape == x.shape


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
def test_arguments_of_another_type(refuses, implementation):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    block = functools.partial(ops.linear_angular_block, implementation=implementation)
    options = {"x": x, "weights": weights, "num_heads": 4}
    for changes, said in (
        ({"x": x[:0]}, "x must not be empty, but has the shape (0, 16, 64)"),
        ({"x": x[:, :0]}, "x must not be empty"),
        ({"weights": weights._asdict()}, "takes BlockWeights as weights, not dict"),
        ({"weights": weights._replace(proj_bias=None)}, "proj_bias must be an array, not NoneType"),
        ({"weights": weights._replace(qkv_kernel=jnp.zeros((64, 192), int))}, "qkv_kernel must be of a floating type"),
        ({"weights": weights._replace(fc1_kernel=jnp.zeros((64, 0)))}, "fc1_kernel must have the shape"),
        ({"num_heads": 4.0}, "takes a whole number as num_heads, not float"),
        ({"needed_tokens": 1.5}, "takes a whole number or None as needed_tokens, not float"),
        ({"epsilon": jnp.float32(1e-6)}, "takes a Python float as epsilon"),
    ):
        with refuses(said):
            block(**options | changes)


def test_narrower_weights_do_not_round_the_tokens():
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    weights = jax.tree.map(jnp.bfloat16, weights)
    with jax.default_matmul_precision("highest"):
        one, other = (
            ops.linear_angular_block(x, weights, num_heads=4, implementation=name) for name in ("pallas", "xla")
        )
    assert np.abs(one - other).max() < FLOAT32


def test_shapes_that_do_not_fit(refuses):
    x, weights = draw((2, 16, 64, 4, 256), (9,))
    with refuses("5 heads do not divide 64 channels"):
        ops.linear_angular_block(x, weights, num_heads=5)
    with refuses("proj_bias must have the shape (64,), not (63,)"):
        ops.linear_angular_block(x, weights._replace(proj_bias=jnp.zeros(63)), num_heads=4)
    with refuses("does not fit values with 2 heads"):
        ops.linear_angular_block(x, weights, num_heads=2)


COMPILE = """
    import sys
    import jax, numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from castling_jax import ops
    topology, cases = sys.argv[1], eval(sys.argv[2])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:2]), ("data",), axis_types=(AxisType.Auto,))
    for tokens, channels, taps, grid, dtype in cases:
        def array(*shape, spec=P(), dtype="float32"):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        c, h, heads = channels, 4 * channels, channels // 64
        weights = ops.BlockWeights(
            array(c), array(c), array(c, 3 * c), array(3 * c), array(*taps, heads), array(c, c), array(c),
            array(c), array(c), array(c, h), array(h), array(h, c), array(c))
        where = {} if grid is None else {"grid": grid, "prefix_tokens": 1}
        def block(x, weights):
            return ops.linear_angular_block(x, weights, num_heads=heads, **where)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            x = array(4, tokens, c, spec=P("data"), dtype=dtype)
            text = jax.jit(block).lower(x, weights).compile().as_text()
        assert text.count("tpu_custom_call") == 1, text
        print(tokens, channels)
"""
SIZES = [(197, 192, (9,), None, "bfloat16"), (197, 384, (3, 3), (14, 14), "bfloat16")]
MORE = [(577, 192, (9,), None, "bfloat16"), (50, 768, (9,), None, "bfloat16"), (50, 192, (9,), None, "float32")]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernel_compiles_for(topology):
    sizes = SIZES + (MORE if topology == "v5e:2x2" else [])
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), topology, repr(sizes)],
        env=os.environ | LIBTPU_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("\n") == len(sizes)
