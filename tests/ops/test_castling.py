import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castling_jax import ops
from castling_jax.ops import tokens
from tests.ops import reference, rounding

DTYPES = [jnp.float32, jnp.bfloat16]
castling_attention = jax.jit(ops.castling_attention, static_argnames="implementation")
linear_angular_attention = jax.jit(ops.linear_angular_attention, static_argnames="implementation")


def draw(dtype=jnp.float32, *, batch=2, queries=9, keys=9, heads=3, key_dim=16, value_dim=8, taps=5, seed=0, scale=1.5):
    """q, k, v, token_kernel, query_values: arrays of `dtype`, and the same in float64."""
    arrays, wide = rounding.draw(
        seed,
        dtype,
        (batch, queries, heads, key_dim),
        (batch, keys, heads, key_dim),
        (batch, keys, heads, value_dim),
        (taps, heads),
        (batch, queries, heads, value_dim),
        scale=scale,
    )
    if queries == keys:
        arrays[4], wide[4] = None, None
    return arrays, wide


# The authors' block


@functools.partial(jax.jit, static_argnames="heads")
def official_block(weights, x, cotangent, threshold, heads):
    """The authors' block composed of our operations: (output, mask density, gradients of weights and input)."""

    def block(weights, x):
        qkv = x @ weights["qkv.weight"].T + weights.get("qkv.bias", 0)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), 2, 0)
        taps = weights["dconv.weight"][:, 0, :, 0].T
        if threshold is None:
            out, density = ops.linear_angular_attention(q, k, v, taps), jnp.float32(0)
        else:
            out, density = ops.castling_attention(q, k, v, taps, mask_threshold=threshold)
        return out.reshape(x.shape) @ weights["proj.weight"].T + weights["proj.bias"], density

    out, backward, density = jax.vjp(block, weights, x, has_aux=True)
    return out, density, *backward(cotangent)


@pytest.mark.parametrize("form", ["linear", "castling"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_agrees_with_the_authors_block(golden, number, form):
    file = golden(f"official_attention_{number}_{form}")
    threshold = file.meta["threshold"] if form == "castling" else None
    out, density, gradients, grad_input = official_block(
        file.group("weights"), file["input"], file["cotangent"], threshold, file.meta["num_heads"]
    )
    # float32 in two orders of summation: some 2^-24 of each of the sums over tokens and channels that follow each
    # other, of which the gradients have about three times as many, and cancel.
    assert_close_at_scale(out, file["output"], 2e-6)
    assert_close_at_scale(grad_input, file["grad_input"], 1e-5)
    expected = file.group("grads")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close_at_scale(gradient, expected[name], 1e-5)
    if form == "castling":
        weights = file["input"].shape[0] * file.meta["num_heads"] * file["input"].shape[1] ** 2
        assert 0 < float(file["mask_density"]) < 1
        rounding.assert_density(density, float(file["mask_density"]) * weights, weights)


def assert_close_at_scale(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


# The formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("keys", "bias", "taps"), [(9, "none", 5), (16, "none", None), (9, "dense", None), (16, "factored", 5)]
)
def test_both_attentions_are_added_before_the_normalisation(keys, bias, taps, dtype):
    (q, k, v, kernel, own), (q64, k64, v64, kernel64, own64) = draw(dtype, keys=keys)
    if taps is None:
        kernel, kernel64 = None, None
    b, b64 = None, None
    if bias == "dense":
        (b,), (b64,) = rounding.draw(1, jnp.float32, (1, 3, 9, keys))
    if bias == "factored":
        b, b64 = (
            map(tuple, rounding.draw(1, jnp.float32, (2, 3, 9, keys // 4), (2, 3, 9, 4))) if keys == 16 else (b, b64)
        )
    weights = reference.softmax(reference.scaled_scores(q64, k64, b64))
    threshold = reference.clear_threshold(weights, 0.1)
    out, density = castling_attention(q, k, v, kernel, mask_threshold=threshold, bias=b, query_values=own)
    chex.assert_type(out, dtype)
    expected, expected_density = reference.castling(
        q64, k64, v64, kernel64, threshold=threshold, bias=b64, query_values=own64
    )
    rounding.assert_within(out, expected, rounding.attention(q64, k64, v64, kernel64, own64, dtype, threshold, b64))
    rounding.assert_density(density, expected_density * weights.size, weights.size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_tell_mistakes_apart(dtype):
    _, (q, k, v, taps, _) = draw(dtype)
    weights = reference.softmax(reference.scaled_scores(q, k))
    threshold = reference.clear_threshold(weights, 0.1)
    bound = rounding.attention(q, k, v, taps, None, dtype, threshold)
    expected, _ = reference.castling(q, k, v, taps, threshold=threshold)
    core, (auxiliary, _) = reference.linear_core(q, k, v, v), reference.masked_softmax(q, k, v, threshold)
    convolved = reference.convolve_tokens(v, taps)
    kept = weights * (weights > threshold)
    renormalised = np.einsum("bhqk,bkhd->bqhd", kept / np.maximum(kept.sum(-1, keepdims=True), 1e-9), v)
    half_sum = core - 0.5 * v + 0.5 * v.sum(1, keepdims=True)
    k_as_it_is = 0.5 * v + np.einsum("bhqk,bkhd->bqhd", reference.scores_of(reference.normalize(q), k) / np.pi, v)
    q_normalised, _ = reference.masked_softmax(reference.normalize(q), reference.normalize(k), v, threshold)
    mistakes = {
        "K not normalised": reference.normalize(k_as_it_is + auxiliary) + convolved,
        "1/2 sum of V": reference.normalize(half_sum + auxiliary) + convolved,
        "branch renormalised": reference.normalize(core + renormalised) + convolved,
        "branch of normalised q and k": reference.normalize(core + q_normalised) + convolved,
        "branch after the normalisation": reference.normalize(core) + auxiliary + convolved,
        "convolution inside the normalisation": reference.normalize(core + auxiliary + convolved),
        "kernel flipped": reference.normalize(core + auxiliary) + reference.convolve_tokens(v, taps[::-1]),
        "no branch": reference.linear_angular(q, k, v, taps),
    }
    for mistake, wrong in mistakes.items():
        assert np.max(np.abs(wrong - expected) / bound) > 3, mistake


# A sweep of shapes, thresholds and scales


@st.composite
def cases(draw_):
    keys = draw_(st.integers(1, 24), label="keys")
    return {
        "batch": draw_(st.integers(1, 3)),
        "keys": keys,
        "queries": draw_(st.one_of(st.just(keys), st.integers(1, 24))),
        "heads": draw_(st.integers(1, 4)),
        "key_dim": draw_(st.sampled_from([1, 2, 3, 8, 16, 33])),
        "value_dim": draw_(st.sampled_from([1, 2, 5, 16, 32])),
        "taps": draw_(st.sampled_from([1, 3, 9])),
        "scale": draw_(st.sampled_from([1e-3, 0.3, 1.0, 3.0, 10.0])),
        "seed": draw_(st.integers(0, 2**16)),
    }


def check_sweep(dtype, case):
    (q, k, v, taps, own), (q64, k64, v64, taps64, own64) = draw(dtype, **case)
    weights = reference.softmax(reference.scaled_scores(q64, k64))
    # One compilation serves all thresholds.
    for threshold in (0.0, 1e-6, 0.02, 0.5, 1.0, 3.0):
        out, density = castling_attention(q, k, v, taps, mask_threshold=threshold, query_values=own)
        near = rounding.near_threshold(q64, k64, threshold)
        # Rounding may flip a mask there: such rows are not compared, unless the weight itself is nothing.
        left_out = np.any(near & (weights > 1e-30), axis=-1).transpose(0, 2, 1)[..., None]
        expected, _ = reference.castling(q64, k64, v64, taps64, threshold=threshold, query_values=own64)
        bound = rounding.attention(q64, k64, v64, taps64, own64, dtype, threshold)
        rounding.assert_within(np.where(left_out, expected, out), expected, bound)
        kept = reference.mask_of(weights, threshold)
        assert np.sum(kept & ~near) - 0.5 < float(density) * weights.size < np.sum(kept | near) + 0.5
        if threshold >= 1:
            # The mask is empty: no row may be left out, and the inference form is the same up to the few roundings by
            # which two compilations of tiny shapes may differ.
            assert not left_out.any()
            linear = linear_angular_attention(q, k, v, taps, query_values=own)
            values = np.abs(v64 if own64 is None else own64)
            sizes = 1 + reference.convolve_tokens(values, np.abs(taps64))
            rounding.assert_within(out, np.asarray(linear, np.float64), 8 * rounding.unit(dtype) * sizes)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_sweep(dtype, case):
    check_sweep(dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_long_sweep(dtype, case):
    check_sweep(dtype, case)


# The threshold, and what becomes of the branch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.0, 2.5])
@pytest.mark.parametrize("keys", [9, 14])
def test_a_traced_threshold_of_one_is_the_inference_form(keys, threshold, dtype):
    (q, k, v, taps, own), _ = draw(dtype, keys=keys)
    out, density = castling_attention(q, k, v, taps, mask_threshold=threshold, query_values=own)
    chex.assert_trees_all_equal(out, linear_angular_attention(q, k, v, taps, query_values=own))
    assert float(density) == 0


def test_gradients_at_threshold_one_are_the_inference_forms():
    (q, k, v, taps, _), _ = draw()

    @jax.jit
    def gradients(arrays, threshold):
        return jax.grad(lambda a: jnp.sum(ops.castling_attention(*a, mask_threshold=threshold)[0]))(arrays)

    linear = jax.jit(jax.grad(lambda a: jnp.sum(ops.linear_angular_attention(*a))))((q, k, v, taps))
    # Nothing is added to the gradients but zeros; the sums around them may be compiled in another order.
    chex.assert_trees_all_close(gradients((q, k, v, taps), 1.0), linear, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threshold", [1, 1.0, 5.0, np.float32(1)])
def test_a_known_threshold_of_one_leaves_the_quadratic_products_out(threshold):
    (q, k, v, taps, own), _ = draw(queries=23, keys=29)

    def quadratic(threshold):
        def function(q, k, v, taps, own):
            # The kernels' program has one of its own for every platform, which cannot be read off as plainly.
            return ops.castling_attention(
                q, k, v, taps, mask_threshold=threshold, query_values=own, implementation="xla"
            )

        return [shape for shape in rounding.shapes_in(function, q, k, v, taps, own) if 23 in shape and 29 in shape]

    assert quadratic(0.5)
    assert not quadratic(threshold)


def test_a_new_threshold_does_not_compile_again():
    (q, k, v, taps, _), _ = draw()
    traces = []

    @jax.jit
    def attention(threshold):
        traces.append(threshold)
        return ops.castling_attention(q, k, v, taps, mask_threshold=threshold)

    densities = [float(attention(threshold)[1]) for threshold in (0.0, 0.02, 0.5, 1.0)]
    assert len(traces) == 1
    assert attention._cache_size() == 1
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[1] > densities[-1] == 0


def test_known_and_traced_thresholds_agree():
    (q, k, v, taps, _), (q64, k64, *_) = draw()
    threshold = reference.clear_threshold(reference.softmax(reference.scaled_scores(q64, k64)), 0.1)
    known = ops.castling_attention(q, k, v, taps, mask_threshold=threshold)
    traced = castling_attention(q, k, v, taps, mask_threshold=threshold)
    # Output and values are of order one; compiling as a whole may reorder the sums of some ten terms.
    chex.assert_trees_all_close(known, traced, rtol=0, atol=1e-5)


# Derivatives, transformations, zeros


@pytest.mark.parametrize("queries", [4, 6])
def test_gradients_match_differences(queries):
    _, (q, k, v, taps, own) = draw(queries=queries, keys=6, key_dim=5, value_dim=3)
    _, (rows, columns) = rounding.draw(1, jnp.float32, (2, 3, queries, 2), (2, 3, queries, 3))
    weights = reference.softmax(reference.scaled_scores(q, k, (rows, columns)))
    threshold = reference.clear_threshold(weights, 0.1)

    def function(q, k, v, taps, rows, columns, own=None):
        return ops.castling_attention(q, k, v, taps, mask_threshold=threshold, bias=(rows, columns), query_values=own)[
            0
        ]

    rounding.assert_gradients_match_differences(function, q, k, v, taps, rows, columns, *([] if own is None else [own]))


def test_vmap_is_a_loop():
    (q, k, v, taps, _), _ = draw()

    def function(q, k, v, threshold):
        return ops.castling_attention(q, k, v, taps, mask_threshold=threshold)

    thresholds = jnp.asarray([0.0, 0.1, 1.0])
    stacked = jax.jit(jax.vmap(function, in_axes=(0, None, None, 0)))(jnp.stack([q, 2 * q, q]), k, v, thresholds)
    for i, query in enumerate((q, 2 * q, q)):
        one = castling_attention(query, k, v, taps, mask_threshold=thresholds[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], stacked), one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_taps", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_do_not_explode_the_gradients(dtype, with_taps):
    (q, k, v, taps, _), _ = draw(dtype, batch=1)
    q, k, v = rounding.with_zeros(q, k, v)
    taps = taps if with_taps else None

    @functools.partial(jax.grad, argnums=(0, 1, 2, 3), has_aux=True)
    def total(q, k, v, taps, threshold):
        out, _ = ops.castling_attention(q, k, v, taps, mask_threshold=threshold)
        return jnp.sum(out.astype(jnp.float32)), out

    compiled = jax.jit(total)
    for threshold in (0.0, 0.02, 1.0):
        gradients, out = compiled(q, k, v, taps, threshold)
        chex.assert_tree_all_finite((gradients, out))
        rounding.assert_zeros_do_not_explode(gradients[:3])


def test_query_values_default_to_the_values():
    (q, k, v, taps, _), _ = draw()
    chex.assert_trees_all_equal(
        castling_attention(q, k, v, taps, mask_threshold=0.1),
        castling_attention(q, k, v, taps, mask_threshold=0.1, query_values=v),
    )


@pytest.mark.parametrize("size", [(3,), (3, 3)])
def test_query_values_by_their_tokens_are_those_values(size):
    (q, k, v, _, _), _ = draw()
    which = np.array([0, 3, 6, 8])
    arguments = q[:, :4], k, v, jax.random.normal(jax.random.key(3), (*size, q.shape[2]))
    where = {"grid": (2, 2)} if len(size) == 2 else {}
    for attention, threshold in [(ops.castling_attention, {"mask_threshold": 0.1}), (ops.linear_angular_attention, {})]:
        chex.assert_trees_all_equal(
            attention(*arguments, query_values=which, **threshold, **where),
            attention(*arguments, query_values=v[:, which], **threshold, **where),
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpus_product_selects_the_same_tokens(dtype):
    x, which = jax.random.normal(jax.random.key(0), (2, 9, 3, 4)).astype(dtype), np.array([8, 0, 3, 3])
    multiplied = tokens._multiply(x.reshape(2, 9, 12), which).reshape(2, 4, 3, 4)
    chex.assert_trees_all_equal(multiplied, x[:, which], tokens.select_tokens(x, which))


def test_auto_is_xla():
    (q, k, v, taps, _), _ = draw()
    chex.assert_trees_all_equal(
        castling_attention(q, k, v, taps, mask_threshold=0.1),
        castling_attention(q, k, v, taps, mask_threshold=0.1, implementation="xla"),
    )
