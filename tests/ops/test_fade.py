"""Castling attention whose softmax branch fades by a factor, in the place of the mask."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops
from tests.ops import reference, rounding

fading = functools.partial(ops.castling_attention, mask_kind="fade")
IMPLEMENTATIONS = ["auto", "xla", "pallas"]


def draw(dtype=jnp.float32, scale=1.5):
    """q, k, v, taps, query_values, bias: more keys than queries."""
    shapes = [(2, 5, 2, 8), (2, 9, 2, 8), (2, 9, 2, 8), (3, 2), (2, 5, 2, 8), (1, 2, 5, 9)]
    return rounding.draw(0, dtype, *shapes, scale=scale)


def by_hand(q, k, v, taps, own, bias, threshold):
    weights = (1 - min(threshold, 1)) * reference.softmax(reference.scaled_scores(q, k, bias))
    core = reference.linear_core(q, k, v, own) + np.einsum("bhqk,bkhd->bqhd", weights, v)
    return reference.normalize(core) + reference.convolve_tokens(own, taps)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.999, 1.0, 1.5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_branch_fades_with_a_traced_threshold(implementation, threshold):
    (q, k, v, taps, own, bias), wide = draw()

    @jax.jit
    def run(t):
        return fading(q, k, v, taps, mask_threshold=t, bias=bias, query_values=own, implementation=implementation)

    out, density = run(threshold)
    # Sums of 8 and 9 terms, and a norm.
    np.testing.assert_allclose(out, by_hand(*wide, threshold), rtol=0, atol=3e-6)
    assert float(density) == pytest.approx(max(1 - threshold, 0), abs=1e-7)
    assert density.dtype == jnp.float32
    if threshold >= 1:
        linear = ops.linear_angular_attention(q, k, v, taps, query_values=own, implementation=implementation)
        assert float(density) == 0
        chex.assert_trees_all_close(out, linear, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_its_gradients_are_finite_differences_of_the_equation(implementation):
    (q, k, v, taps, own, bias), wide = draw()
    directions = [np.random.default_rng(1).normal(size=array.shape) for array in wide]
    cotangent = np.random.default_rng(2).normal(size=own.shape)

    @jax.jit
    def gradients(arrays, t):
        def total(arrays):
            q, k, v, taps, own, bias = arrays
            out, _ = fading(q, k, v, taps, mask_threshold=t, bias=bias, query_values=own, implementation=implementation)
            return jnp.vdot(out, cotangent.astype(np.float32))

        return jax.grad(total)(arrays)

    for array, gradient, direction in zip(
        range(6), gradients([q, k, v, taps, own, bias], jnp.float32(0.4)), directions, strict=True
    ):
        moved = [list(wide) for _ in range(2)]
        for arrays, sign in zip(moved, (1, -1), strict=True):
            arrays[array] = arrays[array] + sign * 1e-5 * direction
        above, below = (float(np.vdot(by_hand(*arrays, 0.4), cotangent)) for arrays in moved)
        slope = float(np.vdot(np.asarray(gradient, np.float64), direction))
        # float32's rounding of some hundred terms of order 1.
        assert slope == pytest.approx((above - below) / 2e-5, abs=1e-4)


@pytest.mark.slow
def test_weights_that_underflow_neither_break_it_nor_pass_a_gradient():
    (q, k, v, taps, own, _), wide = draw(scale=30)

    def run(q, k):
        return fading(q, k, v, taps, mask_threshold=jnp.float32(0.5), query_values=own)[0]

    weights = reference.softmax(reference.scaled_scores(*wide[:2]))
    assert np.min(weights) < 1e-50  # nothing in float32
    out, pullback = jax.vjp(run, q, k)
    # Scores of up to some hundreds are off by 1e-5 of a unit, and so are the weights.
    np.testing.assert_allclose(out, by_hand(*wide[:5], 0, 0.5), rtol=0, atol=1e-3)
    chex.assert_tree_all_finite(pullback(jnp.ones_like(out)))


def test_bfloat16_is_rounded_once_more():
    (q, k, v, taps, own, bias), wide = draw(jnp.bfloat16)
    out, _ = fading(q, k, v, taps, mask_threshold=0.3, bias=bias, query_values=own)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*wide, 0.3)
    # The branch, the normalised sum, the taps' sum and the output are rounded to 2^-8 of at most the largest output.
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=0, atol=4**0.5 * 2**-8 * np.max(np.abs(expected))
    )


def test_a_fade_that_is_known_to_be_over_is_not_computed():
    (q, k, v, taps, own, _), _ = draw()

    def program(threshold):
        run = functools.partial(fading, mask_threshold=threshold, query_values=own, implementation="xla")
        return str(jax.make_jaxpr(run)(q, k, v, taps))

    assert "5,9]" in program(0.5)
    assert "5,9]" not in program(1.0)


def test_an_unknown_kind_of_mask_is_refused(refuses):
    (q, k, v, taps, own, _), _ = draw()
    with refuses("unknown mask_kind 'fad': did you mean 'fade'?"):
        ops.castling_attention(q, k, v, taps, mask_threshold=0.1, mask_kind="fad", query_values=own)
    with refuses("mask_threshold", "at least 0"):
        fading(q, k, v, taps, mask_threshold=-0.5, query_values=own)
