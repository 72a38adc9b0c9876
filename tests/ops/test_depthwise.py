import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops
from castling_jax.ops import depthwise
from tests.ops import reference, rounding

DTYPES = [jnp.float32, jnp.bfloat16]


def draw(tokens, kernel_shape, dtype=jnp.float32):
    return rounding.draw(0, dtype, (2, tokens, kernel_shape[-1], 3), kernel_shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "taps", "heads"), [(17, 9, 3), (49, 5, 2), (4, 9, 2), (1, 3, 1), (6, 1, 4)])
def test_over_tokens_it_correlates(tokens, taps, heads, dtype):
    (v, kernel), (v64, kernel64) = draw(tokens, (taps, heads), dtype)
    out = ops.depthwise_convolution(v, kernel)
    chex.assert_type(out, dtype)
    bound = rounding.convolution(reference.convolve_tokens, v64, kernel64, dtype)
    rounding.assert_within(out, reference.convolve_tokens(v64, kernel64), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "kernel_shape"), [((4, 4), (3, 3, 2)), ((2, 7), (3, 3, 3)), ((5, 3), (1, 5, 1)), ((2, 2), (7, 5, 2))]
)
def test_over_the_grid_it_correlates_in_both_directions(grid, kernel_shape, dtype):
    (v, kernel), (v64, kernel64) = draw(grid[0] * grid[1], kernel_shape, dtype)
    out = ops.depthwise_convolution(v, kernel, grid=grid)
    chex.assert_type(out, dtype)

    def convolve(v, kernel):
        return reference.convolve_grid(v, kernel, grid)

    rounding.assert_within(out, convolve(v64, kernel64), rounding.convolution(convolve, v64, kernel64, dtype))


@pytest.mark.parametrize("prefix_tokens", [1, 2])
@pytest.mark.parametrize(("grid", "kernel_shape"), [(None, (5, 2)), ((3, 4), (3, 3, 2))])
def test_prefix_tokens_neither_give_nor_get(grid, kernel_shape, prefix_tokens):
    (v, kernel), _ = draw(prefix_tokens + 12, kernel_shape)
    out = ops.depthwise_convolution(v, kernel, grid=grid, prefix_tokens=prefix_tokens)
    chex.assert_trees_all_equal(out[:, :prefix_tokens], jnp.zeros_like(out[:, :prefix_tokens]))
    patches = ops.depthwise_convolution(v[:, prefix_tokens:], kernel, grid=grid)
    chex.assert_trees_all_equal(out[:, prefix_tokens:], patches)


def test_nothing_but_prefix_tokens_gives_zeros():
    (v, kernel), _ = draw(2, (3, 2))
    chex.assert_trees_all_equal(ops.depthwise_convolution(v, kernel, prefix_tokens=2), jnp.zeros_like(v))


def test_the_kernel_is_not_flipped_and_its_middle_stands_on_the_token():
    impulse = jnp.zeros((1, 5, 1, 1)).at[0, 2].set(1)
    kernel = jnp.asarray([1.0, 2.0, 3.0])[:, None]
    out = ops.depthwise_convolution(impulse, kernel)[0, :, 0, 0]
    chex.assert_trees_all_equal(out, jnp.asarray([0.0, 3.0, 2.0, 1.0, 0.0]))


def test_each_head_has_its_own_taps_and_its_channels_share_them():
    v = jnp.ones((1, 3, 2, 4))
    kernel = jnp.asarray([[0.0, 0.0], [1.0, 10.0], [0.0, 0.0]])
    out = ops.depthwise_convolution(v, kernel)
    chex.assert_trees_all_equal(out, jnp.broadcast_to(jnp.asarray([1.0, 10.0])[:, None], out.shape))


def test_float32_taps_are_not_rounded_to_bfloat16_before_they_act():
    # 1.5 * 1.003 = 1.5045 is nearer to bfloat16's 1.5078125 than to 1.5; a tap rounded first would be 1.
    v, tap = jnp.full((1, 1, 1, 1), 1.5, jnp.bfloat16), jnp.full((1, 1), 1.003, jnp.float32)
    chex.assert_trees_all_equal(ops.depthwise_convolution(v, tap), jnp.full_like(v, 1.5078125))


@pytest.mark.parametrize(("grid", "kernel_shape"), [(None, (5, 2)), ((3, 4), (3, 3, 2))])
def test_gradients_match_differences(grid, kernel_shape):
    _, arrays = draw(13, kernel_shape)
    rounding.assert_gradients_match_differences(
        lambda v, kernel: ops.depthwise_convolution(v, kernel, grid=grid, prefix_tokens=1), *arrays
    )


def test_zeros_give_finite_gradients():
    gradients = jax.grad(lambda v, kernel: jnp.sum(ops.depthwise_convolution(v, kernel)), argnums=(0, 1))(
        jnp.zeros((1, 4, 2, 3)), jnp.zeros((9, 2))
    )
    chex.assert_tree_all_finite(gradients)


def test_jit_and_vmap_change_nothing():
    (v, kernel), _ = draw(12, (3, 3, 2))

    def function(v, kernel):
        return ops.depthwise_convolution(v, kernel, grid=(3, 4))

    plain = function(v, kernel)
    chex.assert_trees_all_close(jax.jit(function)(v, kernel), plain, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(jax.vmap(function)(v[None], kernel[None])[0], plain, rtol=0, atol=1e-6)


def test_a_float64_reference_agrees_with_numpy_convolve():
    # np.convolve flips its kernel: the reference the other tests rest on is checked against it.
    rng = np.random.default_rng(0)
    v, kernel = rng.normal(size=(1, 12, 1, 1)), rng.normal(size=(5, 1))
    expected = np.convolve(v[0, :, 0, 0], kernel[::-1, 0], "same")
    np.testing.assert_allclose(reference.convolve_tokens(v, kernel)[0, :, 0, 0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sizes", "taps"),
    [
        ((17,), (9,)),
        pytest.param((3,), (5,), marks=pytest.mark.slow),
        ((4, 6), (3, 3)),
        pytest.param((2, 2), (5, 3), marks=pytest.mark.slow),
    ],
)
def test_what_a_tpu_runs_is_the_same_convolution(sizes, taps, dtype):
    arrays = rounding.draw(0, dtype, (2, *sizes, 2, 3), (*taps, 2), (2, *sizes, 2, 3))[0]
    patches, kernel, cotangent = arrays

    def both(convolve):
        out, backward = jax.vjp(convolve, patches, kernel)
        return out, *backward(cotangent)

    on_tpu, elsewhere = both(depthwise._convolution), both(depthwise._shifted_taps)
    chex.assert_trees_all_equal_shapes_and_dtypes(on_tpu, elsewhere)
    # Up to 2 x 24 x 3 products of numbers up to 4, added in another order and rounded once.
    for ours, theirs in zip(on_tpu, elsewhere, strict=True):
        largest = float(jnp.max(jnp.abs(theirs.astype(jnp.float32))))
        chex.assert_trees_all_close(ours, theirs, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * max(largest, 8))


@pytest.mark.parametrize(
    ("sizes", "taps", "strides"), [((9,), (5,), (1,)), ((5, 4), (3, 5), (1, 1)), ((5, 4), (3, 3), (2, 3))]
)
def test_the_gradient_in_parts_is_jaxs_of_the_convolution(sizes, taps, strides):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, *sizes, 6), (*taps, 1, 6)))

    def gradients(function):
        return jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays, strides, None))), argnums=(0, 1))(x, kernel)

    # Up to 40 products, summed in another order.
    chex.assert_trees_all_close(
        gradients(depthwise._convolve_in_parts), gradients(depthwise._convolve), rtol=0, atol=5e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "taps", "stride", "dtype"),
    [
        ((9, 12), (5, 5), 1, jnp.float32),
        ((10, 12), (5, 5), 2, jnp.float32),
        ((3, 2), (3, 5), 3, jnp.float32),
        ((5, 7), (3, 3), 2, jnp.bfloat16),
    ],
)
def test_the_fast_convolution_of_channels_is_xlas(size, taps, stride, dtype):
    """With the gradients, of which XLA's are transposed convolutions."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*taps, 1, 3)), dtype)

    def wide(x, kernel):
        x, kernel = (array.astype(jnp.float32) for array in (x, kernel))
        return depthwise.convolve_channels(x, kernel, (stride, stride))

    expected, exact_backward = jax.vjp(wide, x, kernel)
    out, backward = jax.vjp(lambda x, kernel: depthwise.convolve_taps(x, kernel, stride), x, kernel)
    chex.assert_type(out, dtype)
    d_out = jnp.asarray(rng.normal(size=out.shape), dtype)
    # Sums of at most 25 products of order 1, or of 200 for a tap, in float32; then rounded to their type.
    limit = 2e-5 if dtype == jnp.float32 else 2**-8
    pairs = zip((out, *backward(d_out)), (expected, *exact_backward(d_out.astype(jnp.float32))), strict=True)
    for actual, exact in pairs:
        chex.assert_type(actual, dtype)
        exact = np.asarray(exact, np.float32)
        np.testing.assert_allclose(np.asarray(actual, np.float32), exact, rtol=0, atol=limit * max(1, abs(exact).max()))
