import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops
from castling_jax.ops.bias import dense_bias
from tests.ops import reference, rounding

DTYPES = [jnp.float32, jnp.bfloat16]
# Compiled once for each shape, whatever the threshold; the tests that need a known threshold call the operation itself.
masked_softmax_attention = jax.jit(ops.masked_softmax_attention, static_argnames="implementation")
BIASES = ["none", "shared", "by batch", "factored", "factored and shared"]
QUERIES, KEYS, HEADS = 5, 12, 2


def draw(bias, dtype=jnp.float32):
    """(q, k, v), bias: arrays of `dtype`, and the same in float64. The bias is float32, as parameters are."""
    arrays, wide = rounding.draw(
        0, dtype, (3, QUERIES, HEADS, 16), (3, KEYS, HEADS, 16), (3, KEYS, HEADS, 8), scale=1.5
    )
    batch = 1 if "shared" in bias else 3
    shapes = [(batch, HEADS, QUERIES, KEYS)]
    if "factored" in bias:
        shapes = [(batch, HEADS, QUERIES, 3), (batch, HEADS, QUERIES, 4)]
    biases, wide_biases = rounding.draw(1, jnp.float32, *shapes)
    if bias == "none":
        return arrays, None, wide, None
    if "factored" in bias:
        return arrays, tuple(biases), wide, tuple(wide_biases)
    return arrays, biases[0], wide, wide_biases[0]


def test_factors_are_added_in_float32():
    factors, (rows, columns) = rounding.draw(0, jnp.bfloat16, (1, 2, 5, 3), (1, 2, 5, 4))
    total = (rows[..., :, None] + columns[..., None, :]).reshape(1, 2, 5, 12)
    np.testing.assert_allclose(dense_bias(tuple(factors)), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("bias", BIASES)
def test_weights_over_the_threshold_are_summed_as_they_are(bias, near, dtype):
    (q, k, v), b, (q64, k64, v64), b64 = draw(bias, dtype)
    threshold = reference.clear_threshold(reference.softmax(reference.scaled_scores(q64, k64, b64)), near)
    out, density = masked_softmax_attention(q, k, v, mask_threshold=threshold, bias=b)
    chex.assert_type(out, dtype)
    mask_size = 3 * HEADS * QUERIES * KEYS
    expected, expected_density = reference.masked_softmax(q64, k64, v64, threshold, b64)
    assert 0 < expected_density < 1
    rounding.assert_density(density, expected_density * mask_size, mask_size)
    rounding.assert_within(out, expected, rounding.branch(q64, k64, v64, threshold, dtype, b64))


@pytest.mark.parametrize("implementation", ["auto", "pallas", "xla"])
def test_the_density_of_a_pods_batch_can_be_counted(implementation):
    # 7.6e9 weights, more than an int32 counts.
    q = jax.ShapeDtypeStruct((16384, 197, 12, 64), jnp.bfloat16)
    out, density = jax.eval_shape(
        lambda *qkv: ops.masked_softmax_attention(*qkv, mask_threshold=0.1, implementation=implementation), q, q, q
    )
    assert (out.shape, density.shape) == (q.shape, ())


def test_what_is_kept_is_not_renormalised():
    # Weights 3/4 and 1/4.
    k = jnp.log(jnp.asarray([3.0, 1.0]))[None, :, None, None]
    v = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])[None, :, None]
    out, density = ops.masked_softmax_attention(jnp.ones((1, 1, 1, 1)), k, v, mask_threshold=0.5)
    chex.assert_trees_all_close(out[0, 0, 0], jnp.asarray([0.75, 0.0]), rtol=0, atol=2e-7)
    assert float(density) == 0.5


@pytest.mark.parametrize(
    ("keys", "branch"),
    [(50, ops.masked_softmax_attention), *((keys, masked_softmax_attention) for keys in (2, 3, 50, 100))],
)
def test_a_weight_equal_to_the_threshold_is_masked(keys, branch):
    # All scores are zero: every weight is 1 / keys.
    q, k = jnp.zeros((1, 3, 2, 4)), jnp.ones((1, keys, 2, 4))
    tie = np.float32(1 / keys)
    out, density = branch(q, k, k, mask_threshold=tie)
    assert float(density) == 0
    chex.assert_trees_all_equal(out, jnp.zeros_like(out))
    _, density = branch(q, k, k, mask_threshold=np.nextafter(tie, np.float32(0)))
    assert float(density) == pytest.approx(1, abs=1e-6)


def test_a_single_key_is_kept_under_one_and_masked_at_one():
    (q, _, _), _, _, _ = draw("none")
    k = v = q[:, :1]
    out, density = masked_softmax_attention(q, k, v, mask_threshold=np.nextafter(np.float32(1), np.float32(0)))
    chex.assert_trees_all_equal(out, jnp.broadcast_to(v, out.shape))
    assert float(density) == pytest.approx(1, abs=1e-6)
    assert float(masked_softmax_attention(q, k, v, mask_threshold=1.0)[1]) == 0


def test_threshold_zero_is_softmax_attention():
    (q, k, _), _, _, _ = draw("none")
    out, density = ops.masked_softmax_attention(q, k, k, mask_threshold=0)
    assert float(density) == pytest.approx(1, abs=1e-6)
    # Twelve weights whose sum is 1, of scores up to ten or so, each off by some 16 roundings.
    chex.assert_trees_all_close(out, jax.nn.dot_product_attention(q, k, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [1, 1.0, 7, np.float32(1), jnp.float32(1)])
def test_a_known_threshold_of_one_leaves_the_branch_out(threshold):
    (q, k, v), bias, _, _ = draw("shared")

    def function(q, k, v):
        return ops.masked_softmax_attention(q, k, v, mask_threshold=threshold, bias=bias)

    out, density = function(q, k, v)
    chex.assert_trees_all_equal((out, density), (jnp.zeros((3, QUERIES, HEADS, 8)), jnp.float32(0)))
    assert not any(QUERIES in shape and KEYS in shape for shape in rounding.shapes_in(function, q, k, v))


@pytest.mark.parametrize("threshold", [1.0, 1.5, np.inf])
def test_a_traced_threshold_of_one_empties_the_mask(threshold):
    (q, k, v), _, _, _ = draw("none")
    # Scores so large that every row is one weight of 1, or by rounding above it.
    out, density = masked_softmax_attention(1e3 * q, k, v, mask_threshold=threshold)
    chex.assert_trees_all_equal((out, density), (jnp.zeros_like(out), jnp.float32(0)))


@pytest.mark.parametrize("bias", ["none", "shared", "factored"])
def test_gradients_match_differences(bias):
    _, _, arrays, b = draw(bias)
    weights = reference.softmax(reference.scaled_scores(*arrays[:2], b))
    # Clear of the threshold, so that the mask is the constant it is taken for.
    threshold = reference.clear_threshold(weights, 0.1)
    biases = b if isinstance(b, tuple) else () if b is None else (b,)

    def function(q, k, v, *biases):
        bias = None if not biases else biases[0] if len(biases) == 1 else biases
        return ops.masked_softmax_attention(q, k, v, mask_threshold=threshold, bias=bias)[0]

    rounding.assert_gradients_match_differences(function, *arrays, *biases)


def test_backward_is_the_documented_one():
    _, _, (q, k, v), bias = draw("by batch")
    weights = reference.softmax(reference.scaled_scores(q, k, bias))
    threshold = reference.clear_threshold(weights, 0.1)
    mask = weights > threshold
    cotangent = np.random.default_rng(2).normal(size=(3, QUERIES, HEADS, 8))
    d_weights = np.einsum("bqhd,bkhd->bhqk", cotangent, v)
    # dS = P * (M * dP - rowsum(P * M * dP))
    d_scores = weights * (mask * d_weights - np.sum(weights * mask * d_weights, axis=-1, keepdims=True))
    expected = (
        np.einsum("bhqk,bkhd->bqhd", d_scores, k) / 4,  # sqrt(16)
        np.einsum("bhqk,bqhd->bkhd", d_scores, q) / 4,
        np.einsum("bhqk,bqhd->bkhd", weights * mask, cotangent),
        d_scores,
    )
    with jax.enable_x64(True):

        @jax.jit
        def backward(cotangent, *arrays):
            def branch(q, k, v, bias):
                return ops.masked_softmax_attention(q, k, v, mask_threshold=threshold, bias=bias)[0]

            return jax.vjp(branch, *arrays)[1](cotangent)

        gradients = backward(*(jnp.asarray(array) for array in (cotangent, q, k, v, bias)))
    chex.assert_trees_all_close(gradients, expected, rtol=0, atol=1e-12)


def test_the_mask_passes_no_gradient_to_the_threshold():
    (q, k, v), _, _, _ = draw("none")
    gradient = jax.grad(lambda t: jnp.sum(ops.masked_softmax_attention(q, k, v, mask_threshold=t)[0]))(0.1)
    assert float(gradient) == 0


def test_a_new_threshold_does_not_compile_again():
    (q, k, v), _, _, _ = draw("none")
    branch = jax.jit(lambda q, k, v, t: ops.masked_softmax_attention(q, k, v, mask_threshold=t))
    densities = [float(branch(q, k, v, t)[1]) for t in (0.0, 0.02, 0.3, 1.0, 2.0)]
    assert branch._cache_size() == 1
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == pytest.approx(1, abs=1e-6)
    assert densities[-2:] == [0, 0]


def test_vmap_over_thresholds_is_a_loop_over_them():
    (q, k, v), _, _, _ = draw("none")
    thresholds = jnp.asarray([0.0, 0.05, 0.2, 1.0])

    def branch(threshold):
        return ops.masked_softmax_attention(q, k, v, mask_threshold=threshold)

    stacked = jax.vmap(branch)(thresholds)
    looped = [branch(threshold) for threshold in thresholds]
    for i, one in enumerate(looped):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], stacked), one, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_and_large_scores_give_finite_values_and_gradients(dtype):
    (q, k, v), _, _, _ = draw("none", dtype)
    q, k, v = (x.at[0].set(0).at[1, 0].set(0) for x in (q, k, v))
    q = q.at[2].multiply(1e4)

    def total(q, k, v):
        out, _ = ops.masked_softmax_attention(q, k, v, mask_threshold=0.02)
        return jnp.sum(out.astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    chex.assert_tree_all_finite((gradients, out))


def test_factors_are_their_outer_sum():
    (q, k, v), (rows, columns), _, _ = draw("factored")
    # Key number row * columns + column, as tokens on a grid are counted.
    dense = (rows[..., :, None] + columns[..., None, :]).reshape(3, HEADS, QUERIES, KEYS)
    factored = masked_softmax_attention(q, k, v, mask_threshold=0.1, bias=(rows, columns))
    chex.assert_trees_all_equal(factored, masked_softmax_attention(q, k, v, mask_threshold=0.1, bias=dense))


def test_auto_is_xla():
    (q, k, v), bias, _, _ = draw("shared")
    results = [
        masked_softmax_attention(q, k, v, mask_threshold=0.1, bias=bias, implementation=implementation)
        for implementation in ("auto", "xla")
    ]
    chex.assert_trees_all_equal(*results)
