import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops
from tests.ops import reference, rounding

# Compiled as a whole, which takes less time than one primitive after the other for every shape.
angular_kernel = jax.jit(ops.angular_kernel)
linear_angular_attention = jax.jit(ops.linear_angular_attention, static_argnames="implementation")
DTYPES = [jnp.float32, jnp.bfloat16]
SHAPES = [  # batch, queries, keys, heads, key_dim, value_dim
    (2, 7, 7, 3, 8, 8),
    (1, 1, 1, 1, 1, 1),
    (2, 5, 11, 2, 16, 32),
    (1, 50, 50, 3, 64, 64),
]


def qkv(shape, dtype=jnp.float32, seed=0, scale=1.0):
    batch, queries, keys, heads, key_dim, value_dim = shape
    return rounding.draw(
        seed,
        dtype,
        (batch, queries, heads, key_dim),
        (batch, keys, heads, key_dim),
        (batch, keys, heads, value_dim),
        (batch, queries, heads, value_dim),
        scale=scale,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_one_minus_angle_over_pi(shape, dtype):
    (q, k, _, _), (q64, k64, _, _) = qkv(shape, dtype)
    sim = angular_kernel(q, k)
    chex.assert_type(sim, jnp.float32)
    rounding.assert_within(sim, reference.kernel(q64, k64), rounding.kernel(q64, k64))


def test_kernel_at_known_angles():
    q = jnp.asarray([[2.0, 0.0]])[None, :, None]
    k = jnp.asarray([[5.0, 0.0], [1.0, 1.0], [0.0, 0.1], [-3.0, 3.0], [-1.0, 0.0]])[None, :, None]
    sim = ops.angular_kernel(q, k)[0, 0, 0]
    chex.assert_trees_all_close(sim, jnp.asarray([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=3e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_kernel_does_not_see_lengths(scale):
    (q, k, _, _), (q64, k64, _, _) = qkv(SHAPES[2])
    rounding.assert_within(
        ops.angular_kernel(q * scale, k), reference.kernel(q64, k64), rounding.kernel(q64, k64) + rounding.FLOAT32
    )


@pytest.mark.parametrize("order", [0, 1, 2, 3, 7, 25])
def test_series_is_the_partial_sum(order):
    (q, k, _, _), (q64, k64, _, _) = qkv(SHAPES[2])
    # The slope of the partial sum at 1 is the sum of (2i)! / (2^2i (i!)^2), at most 1 + 2 sqrt(order / pi).
    slope = 1 + 2 * np.sqrt(order / np.pi)
    bound = (slope * rounding.cosine(16) + (2 * order + 8) * rounding.FLOAT32) / np.pi + rounding.FLOAT32
    rounding.assert_within(
        jax.jit(ops.angular_kernel_series, static_argnums=2)(q, k, order), reference.series(q64, k64, order), bound
    )


def test_series_of_order_zero_is_the_two_linear_terms():
    (q, k, _, _), (q64, k64, _, _) = qkv(SHAPES[0])
    cosines = reference.scores_of(reference.normalize(q64), reference.normalize(k64))
    rounding.assert_within(ops.angular_kernel_series(q, k, 0), 0.5 + cosines / np.pi, rounding.cosine(8))


def test_series_converges_to_the_kernel():
    _, (q, k, _, _) = qkv(SHAPES[2])
    with jax.enable_x64(True):
        exact = np.asarray(ops.angular_kernel(jnp.asarray(q), jnp.asarray(k)))
        remainders = [np.abs(ops.angular_kernel_series(jnp.asarray(q), jnp.asarray(k), n) - exact) for n in (0, 5, 20)]
    cosines = np.abs(reference.scores_of(reference.normalize(q), reference.normalize(k)))
    assert np.all(remainders[1] <= remainders[0] + 1e-15)
    assert np.all(remainders[2] <= remainders[1] + 1e-15)
    # Coefficients only fall, so the remainder is at most the geometric series after the last term.
    tail = cosines**43 / (1 - cosines**2) / np.pi / 43
    assert np.all(remainders[2] <= tail + 1e-15)
    assert np.max(tail[cosines < 0.7]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_angular_attention_is_the_kernel_times_values(dtype):
    (q, k, v, _), (q64, k64, v64, _) = qkv(SHAPES[2], dtype)
    out = jax.jit(ops.angular_attention)(q, k, v)
    chex.assert_type(out, dtype)
    expected = np.einsum("bhqk,bkhd->bqhd", reference.kernel(q64, k64), v64)
    errors = rounding.kernel(q64, k64) + (k.shape[1] + 1) * rounding.FLOAT32 * reference.kernel(q64, k64)
    bound = np.einsum("bhqk,bkhd->bqhd", errors, np.abs(v64)) + rounding.unit(dtype) * np.abs(expected)
    rounding.assert_within(out, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [None, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_angular_attention_is_the_quadratic_sum(shape, taps, dtype):
    (q, k, v, own), (q64, k64, v64, own64) = qkv(shape, dtype)
    if q.shape[1] == k.shape[1]:
        own, own64 = None, None
    kernel, kernel64 = None, None
    if taps is not None:
        (kernel,), (kernel64,) = rounding.draw(1, dtype, (taps, q.shape[2]))
    out = linear_angular_attention(q, k, v, kernel, query_values=own)
    chex.assert_type(out, dtype)
    expected = reference.linear_angular(q64, k64, v64, kernel64, own64)
    rounding.assert_within(out, expected, rounding.attention(q64, k64, v64, kernel64, own64, dtype))


def test_linear_angular_has_half_v_where_the_kernel_has_half_the_sum():
    (q, k, v, _), _ = qkv(SHAPES[0])
    weights = ops.angular_kernel_series(q, k, 0)
    core = jnp.einsum("bhqk,bkhd->bqhd", weights, v) - 0.5 * jnp.sum(v, 1, keepdims=True) + 0.5 * v
    expected = core / jnp.linalg.norm(core, axis=-1, keepdims=True)
    chex.assert_trees_all_close(ops.linear_angular_attention(q, k, v), expected, rtol=0, atol=2e-6)


def test_without_taps_the_output_has_unit_length():
    (q, k, v, _), _ = qkv(SHAPES[3])
    lengths = jnp.linalg.norm(ops.linear_angular_attention(q, k, v), axis=-1)
    chex.assert_trees_all_close(lengths, jnp.ones_like(lengths), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_an_activation_is_of_the_whole_output(shape, implementation):
    (q, k, v, own), _ = qkv(shape)
    own = None if q.shape[1] == k.shape[1] else own
    taps = jax.random.normal(jax.random.key(0), (9, q.shape[2]))
    attention = functools.partial(ops.linear_angular_attention, query_values=own, implementation=implementation)

    def with_gradients(function):
        out, pullback = jax.vjp(function, q, k, v, taps)
        return out, pullback(jnp.cos(out))

    x, _ = with_gradients(attention)
    out, gradients = with_gradients(functools.partial(attention, around=ops.Around(activation="hard_swish")))
    # Howard et al., 2019: x relu6(x + 3) / 6. A few roundings of values below 10.
    np.testing.assert_allclose(out, x * np.clip(x + 3, 0, 6) / 6, rtol=1e-6, atol=1e-6)
    _, expected = with_gradients(lambda *arrays: jax.nn.hard_swish(attention(*arrays)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), gradients, expected)


def test_an_unknown_activation(refuses):
    (q, k, v, _), _ = qkv(SHAPES[3])
    with refuses("unknown activation 'hardswish': did you mean 'hard_swish'?"):
        ops.linear_angular_attention(q, k, v, around=ops.Around(activation="hardswish"))


def test_linear_angular_attention_holds_nothing_quadratic_in_tokens():
    (q, k, v, _), _ = qkv((1, 53, 53, 2, 4, 4))
    kernel = jnp.ones((9, 2))
    assert not any(shape.count(53) > 1 for shape in rounding.shapes_in(ops.linear_angular_attention, q, k, v, kernel))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, own, taps: ops.angular_kernel(q, k),
        lambda q, k, v, own, taps: ops.angular_kernel_series(q, k, 3),
        lambda q, k, v, own, taps: ops.angular_attention(q, k, v),
        lambda q, k, v, own, taps: ops.linear_angular_attention(q, k, v, taps, query_values=own),
    ],
    ids=["kernel", "series", "angular", "linear_angular"],
)
def test_gradients_match_differences(function):
    _, arrays = qkv((2, 4, 6, 2, 5, 3))
    taps = np.random.default_rng(1).normal(size=(3, 2))
    rounding.assert_gradients_match_differences(function, *arrays, taps)


FUNCTIONS = {
    "kernel": lambda q, k, v: ops.angular_kernel(q, k),
    "series": lambda q, k, v: ops.angular_kernel_series(q, k, 4),
    "angular": ops.angular_attention,
    "linear_angular": lambda q, k, v: ops.linear_angular_attention(q, k, v, jnp.ones((3, 3), v.dtype)),
    "linear_angular without taps": ops.linear_angular_attention,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_zero_vector_passes_no_gradient(name, dtype):
    (q, k, v, _), _ = qkv((1, 7, 7, 3, 8, 8), dtype)
    q, k, v = rounding.with_zeros(q, k, v)

    def total(q, k, v):
        out = FUNCTIONS[name](q, k, v)
        # Its square too: the cotangents of unit vectors must not all be the same.
        return jnp.sum(out.astype(jnp.float32) + jnp.square(out.astype(jnp.float32))), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    chex.assert_tree_all_finite(out)
    rounding.assert_zeros_do_not_explode(gradients)
    rounding.assert_zeros_pass_nothing((q, k), gradients[:2])


@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_and_opposite_vectors_have_finite_gradients(sign):
    (q, _, v, _), _ = qkv(SHAPES[3])
    k = sign * q
    gradients = jax.jit(jax.grad(lambda q, k: jnp.sum(ops.angular_attention(q, k, v)), argnums=(0, 1)))(q, k)
    chex.assert_tree_all_finite(gradients)
    diagonal = jnp.diagonal(ops.angular_kernel(q, k), axis1=2, axis2=3)
    # Near +-1 the angle is the square root of twice what the cosine lacks.
    bound = np.sqrt(2 * rounding.cosine(64)) / np.pi
    chex.assert_trees_all_close(diagonal, jnp.full_like(diagonal, (sign + 1) / 2), rtol=0, atol=bound)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap_change_nothing(name):
    (q, k, v, _), _ = qkv(SHAPES[0])
    plain = FUNCTIONS[name](q, k, v)
    # Compiled together, sums are made in another order: some roundings of 6e-8 of numbers up to the tokens' count.
    chex.assert_trees_all_close(jax.jit(FUNCTIONS[name])(q, k, v), plain, rtol=0, atol=1e-5)
    stacked = jax.vmap(FUNCTIONS[name])(*(jnp.stack([x, 2 * x]) for x in (q, k, v)))
    chex.assert_trees_all_close(stacked[0], plain, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(stacked[1], FUNCTIONS[name](2 * q, 2 * k, 2 * v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value_dtype", DTYPES)
def test_output_has_the_values_dtype(value_dtype):
    (q, k, v, _), _ = qkv(SHAPES[0])
    v = v.astype(value_dtype)
    chex.assert_type([ops.angular_attention(q, k, v), ops.linear_angular_attention(q, k, v)], value_dtype)


def test_auto_is_xla():
    (q, k, v, _), _ = qkv(SHAPES[0])
    chex.assert_trees_all_equal(
        ops.linear_angular_attention(q, k, v), ops.linear_angular_attention(q, k, v, implementation="xla")
    )
