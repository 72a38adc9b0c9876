"""How far the arithmetic may take a result from the float64 reference: bounds by element, from the sizes of the terms.

A sum of n products in float32 is off by at most n * FLOAT32 * sum |products| (Higham, Accuracy and Stability, 3.5), and
an array rounded to a dtype by unit(dtype) of each element. Products of two bfloat16 numbers are exact in float32.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops import reference

FLOAT32 = 2.0**-24  # half a unit in the last place; what sums and scores are computed in, whatever the inputs are


def unit(dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def draw(seed, dtype, *shapes, scale=1.0):
    """Normal numbers as arrays of `dtype`, and the very same numbers in float64 for the reference."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(scale * rng.normal(size=shape), dtype) for shape in shapes]
    return arrays, [np.asarray(array, np.float64) for array in arrays]


ZERO_SUBSETS = [which for size in (1, 2, 3) for which in itertools.combinations(range(3), size)]
ZERO_TOKENS = (np.array([0, 2, 3]), slice(None))  # some of them, and all


def with_zeros(q, k, v):
    """q, k and v of one batch element, 15 times: without zeros, then each subset zero at some and at all tokens."""
    arrays = [np.repeat(np.asarray(x), 1 + len(ZERO_TOKENS) * len(ZERO_SUBSETS), axis=0) for x in (q, k, v)]
    for element, (tokens, subset) in enumerate(itertools.product(ZERO_TOKENS, ZERO_SUBSETS), 1):
        for which in subset:
            arrays[which][element, tokens] = 0
    return [jnp.asarray(x) for x in arrays]


def assert_zeros_do_not_explode(gradients):
    """The gradients of q, k and v that `with_zeros` made: finite, at most 1e4 times as long as without the zeros."""
    wide = [np.asarray(gradient, np.float64).reshape(gradient.shape[0], -1) for gradient in gradients]
    norms = np.linalg.norm(np.concatenate(wide, axis=1), axis=1)
    assert norms[0] > 0
    assert np.all(norms <= 1e4 * norms[0]), norms  # false for NaN


def assert_zeros_pass_nothing(arrays, gradients):
    """No gradient goes to a zero vector of arrays that are only ever normalised."""
    for array, gradient in zip(arrays, gradients, strict=True):
        is_zero = jnp.all(array == 0, axis=-1)
        assert jnp.any(is_zero)
        assert not jnp.any(gradient[is_zero])


def assert_within(actual, expected, bound):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    assert np.all(np.isfinite(actual))
    excess = np.max(np.abs(actual - expected) / np.maximum(bound, 1e-300), initial=0)
    assert excess <= 1, f"{excess:.3g} times what rounding allows"


def assert_density(actual, kept, weights):
    """The density is that of `kept` of `weights` many: exactly so many, its float32 quotient being off by less."""
    assert jnp.asarray(actual).dtype == jnp.float32
    assert abs(float(actual) * weights - kept) < 1e-6 * weights


def cosine(key_dim):
    # Two unit vectors, each of relative error (key_dim / 2 + 3) roundings, and their sum of key_dim products,
    # which Cauchy and Schwarz keep at or under 1.
    return (2 * key_dim + 8) * FLOAT32


def kernel(q, k):
    """1 - arccos / pi is steep near +-1: the error is what it changes by within the cosine's own."""
    cosines = reference.scores_of(reference.normalize(q), reference.normalize(k))
    at = [
        1 - np.arccos(np.clip(cosines + shift, -1, 1)) / np.pi
        for shift in (-cosine(q.shape[-1]), 0, cosine(q.shape[-1]))
    ]
    return np.maximum(at[2] - at[1], at[1] - at[0]) + 8 * FLOAT32


def linear_core(q, k, v, query_values):
    keys, key_dim = k.shape[1], k.shape[3]
    terms = reference.scores_of(np.abs(reference.normalize(q)), np.abs(reference.normalize(k))) / np.pi
    sizes = np.einsum("bhqk,bkhd->bqhd", terms, np.abs(v))
    # Two normalisations, a sum over keys and one over key_dim, all in float32.
    return (keys + 3 * key_dim + 12) * FLOAT32 * sizes + 2 * FLOAT32 * np.abs(
        reference.linear_core(q, k, v, query_values)
    )


def softmax_weights(q, k, bias=None):
    """The relative error of the softmax weights, [batch, heads, queries, 1]."""
    scores = reference.scaled_scores(q, k, bias)
    products = reference.scaled_scores(np.abs(q), np.abs(k))
    # Score products, scaling, bias (its factors' sum and its own), and the shift by the row's maximum.
    scores_error = FLOAT32 * ((q.shape[3] + 3) * products + 4 * np.abs(scores - reference.scaled_scores(q, k)))
    scores_error += 3 * FLOAT32 * np.max(np.abs(scores), axis=-1, keepdims=True)
    # exp turns an absolute error into a relative one, in the numerator and in the sum; exp and division a few more.
    return 2 * scores_error.max(axis=-1, keepdims=True) + (k.shape[1] + 16) * FLOAT32


def near_threshold(q, k, threshold, bias=None):
    """Where rounding decides on which side of the threshold a weight falls."""
    weights = reference.softmax(reference.scaled_scores(q, k, bias))
    margin = softmax_weights(q, k, bias) * weights + FLOAT32 * threshold + float(np.finfo(np.float32).tiny)
    # From 1 on the mask is empty whatever rounding does.
    return (np.abs(weights - threshold) <= margin) & (threshold < 1)


def branch(q, k, v, threshold, dtype, bias=None):
    weights = reference.softmax(reference.scaled_scores(q, k, bias))
    kept = weights * reference.mask_of(weights, threshold)
    # The sum over keys is float32; the output is rounded to the dtype.
    relative = softmax_weights(q, k, bias) + (k.shape[1] + 1) * FLOAT32
    sizes = np.einsum("bhqk,bkhd->bqhd", kept * relative, np.abs(v))
    return sizes + unit(dtype) * np.abs(np.einsum("bhqk,bkhd->bqhd", kept, v))


def normalized(core, error):
    """|x/|x| - y/|y||^2 = (|x - y|^2 - (|x| - |y|)^2) / (|x| |y|), so |x - y| / sqrt(|x| |y|) bounds the difference."""
    size, off = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (core, error))
    bound = np.where(off < size / 2, off / np.sqrt(size * np.maximum(size - off, size / 2)), 2.0)
    return bound + (core.shape[-1] / 2 + 4) * FLOAT32


def convolution(convolve, v, kernel_, dtype):
    # As many float32 products as taps, then rounded to the dtype.
    taps = kernel_.size // kernel_.shape[-1]
    return (taps + 1) * FLOAT32 * convolve(np.abs(v), np.abs(kernel_)) + unit(dtype) * np.abs(convolve(v, kernel_))


def attention(q, k, v, token_kernel, query_values, dtype, threshold=None, bias=None):
    """linear_angular_attention without a threshold, castling_attention with one."""
    query_values = v if query_values is None else query_values
    core = reference.linear_core(q, k, v, query_values)
    error = linear_core(q, k, v, query_values)
    if threshold is not None:
        core = core + reference.masked_softmax(q, k, v, threshold, bias)[0]
        error = error + branch(q, k, v, threshold, dtype, bias) + FLOAT32 * np.abs(core)
    out = reference.normalize(core)
    bound = normalized(core, error) + unit(dtype) * np.abs(out)
    if token_kernel is not None:
        convolved = reference.convolve_tokens(query_values, token_kernel)
        bound = bound + convolution(reference.convolve_tokens, query_values, token_kernel, dtype)
        bound = bound + unit(dtype) * np.abs(out + convolved)
    # The bounds are of first order; what they leave out is smaller by another factor of the rounding.
    return bound * (1 + 4 * unit(dtype))


def assert_gradients_match_differences(function, *arrays, seed=0):
    """jax.grad against a central difference along a random direction, in float64.

    A step of 1e-5 leaves a truncation error of about 1e-10 and a rounding error of about 1e-11 of the terms: 1e-7 of
    the gradient's size is far from both, and a thousand times finer than float32 could tell.
    """
    rng = np.random.default_rng(seed)
    step = 1e-5
    with jax.enable_x64(True):
        points = [jnp.asarray(array, jnp.float64) for array in arrays]
        directions = [jnp.asarray(rng.normal(size=point.shape)) for point in points]
        shape = jax.eval_shape(function, *points)
        assert shape.dtype == jnp.float64
        cotangent = jnp.asarray(rng.normal(size=shape.shape))

        @jax.jit
        def compare(points):
            def scalar(points):
                return jnp.vdot(cotangent, function(*points))

            def at(step):
                return scalar([point + step * direction for point, direction in zip(points, directions, strict=True)])

            gradients = jax.grad(scalar)(points)
            slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
            size = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients))
            return slope, (at(step) - at(-step)) / (2 * step), size

        slope, difference, size = map(float, compare(points))
    assert size > 0
    assert abs(slope - difference) <= 1e-7 * size


def shapes_in(function, *arguments):
    """The shapes of everything that is computed on the way, inner jaxprs included."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.update(tuple(getattr(variable.aval, "shape", ())) for variable in equation.outvars)
            for parameter in equation.params.values():
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found
