"""Norms of q, k and v that the attentions apply, against arrays that are normalised before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from castling_jax import ops
from castling_jax.ops.castling import castling_attention
from tests.ops import test_tpu

SHAPE = (2, 40, 40, 2, 16, 32)  # two blocks of queries, and the last one is not full


def draw_norms(shape):
    """A mean, a factor and a bias for each channel of q, k and v; the factors are about one, and some are negative."""
    heads, key_dim, value_dim = shape[3:]
    norms = [
        jax.random.normal(jax.random.key(20 + i), (3, heads, dim))
        for i, dim in enumerate((key_dim, key_dim, value_dim))
    ]
    return tuple(
        jnp.array([1.0, 0.3, 0.5])[:, None, None] * norm + jnp.array([0.5, 1, 0])[:, None, None] for norm in norms
    )


def results(
    attention, shape, *, threshold=None, dtype=jnp.float32, wide=False, before=False, activation=None, **options
):
    """The output and all gradients; with `before` the arrays are normalised before the attention, by this formula.

    `wide` is float32 arithmetic on numbers of `dtype`.
    """
    q, k, v, taps, _, cotangent = test_tpu.draw(shape, dtype)
    if wide:
        q, k, v, cotangent = (x.astype(jnp.float32) for x in (q, k, v, cotangent))
    if threshold is not None:
        options["mask_threshold"] = jnp.float32(threshold)

    def run(q, k, v, taps, norms):
        if before:
            q, k, v = (((x - m) * f + b).astype(x.dtype) for x, (m, f, b) in zip((q, k, v), norms, strict=True))
        around = ops.Around(None if before else norms, activation)
        out = attention(q, k, v, taps, around=around, **options)
        return out if threshold is None else out[0]

    out, pullback = jax.jit(functools.partial(jax.vjp, run))(q, k, v, taps, draw_norms(shape))
    return out, None, pullback(cotangent)


@pytest.mark.parametrize("kind", ["whole", pytest.param("blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_kernels_normalise(kind, threshold, monkeypatch):
    test_tpu.use_small_blocks(monkeypatch, kind)
    attention = ops.linear_angular_attention if threshold is None else castling_attention
    found = results(attention, SHAPE, threshold=threshold, implementation="pallas")
    expected = results(attention, SHAPE, threshold=threshold, implementation="xla", before=True)
    test_tpu.assert_close(found, expected, test_tpu.FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 20, 20, 6, 32, 64), (1, 33, 33, 1, 128, 128)])
@pytest.mark.parametrize("options", [{"activation": "hard_swish"}, {"bias": True}])
def test_kernels_normalise_with_other_arguments(shape, options):
    if "bias" in options:
        options = {"bias": test_tpu.draw_bias(shape, "shared")[0]}
    found = results(castling_attention, shape, threshold=0.0, implementation="pallas", **options)
    expected = results(castling_attention, shape, threshold=0.0, implementation="xla", before=True, **options)
    test_tpu.assert_close(found, expected, test_tpu.FLOAT32)


@pytest.mark.slow
def test_values_of_the_tokens_on_which_queries_stand():
    def attention(q, k, v, taps, **options):
        return castling_attention(q[:, ::3], k, v, taps, query_values=np.arange(0, 40, 3), **options)

    q = jnp.zeros((2, 14, 2, 32))

    def of(implementation, before):
        def cut(*arguments, **options):
            out, density = attention(*arguments, **options)
            return jnp.concatenate([out, jnp.zeros((2, 26, *q.shape[2:]))], 1), density

        return results(cut, SHAPE, threshold=0.0, implementation=implementation, before=before)

    test_tpu.assert_close(of("pallas", False), of("xla", True), test_tpu.FLOAT32)


@pytest.mark.slow
def test_bfloat16_within_its_rounding():
    of = functools.partial(results, castling_attention, SHAPE, threshold=0.0, dtype=jnp.bfloat16)
    found, expected = of(implementation="pallas"), of(implementation="xla", before=True, wide=True)
    test_tpu.assert_close(found, expected, test_tpu.BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "auto"])
@pytest.mark.parametrize("threshold", [None, 0.02])
def test_without_kernels_the_arrays_are_normalised_before(implementation, threshold):
    attention = ops.linear_angular_attention if threshold is None else castling_attention
    found = results(attention, SHAPE, threshold=threshold, implementation=implementation)
    expected = results(attention, SHAPE, threshold=threshold, implementation="xla", before=True)
    # The same operations; two programs may fuse them in another way, which rounds a sum otherwise.
    test_tpu.assert_close(found, expected, (1e-6, 1e-6))


@pytest.mark.slow
def test_on_a_mesh_that_splits_heads():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    expected = results(castling_attention, SHAPE, threshold=0.0, implementation="pallas")
    with jax.set_mesh(mesh):
        found = results(castling_attention, SHAPE, threshold=0.0, implementation="pallas")
    test_tpu.assert_close(found, expected, test_tpu.FLOAT32)


@pytest.mark.parametrize(
    ("around", "said"), [(None, "NoneType"), ("hard_swish", "str"), (ops.Around(norms=(1, 2)), "2 norms")]
)
def test_what_is_no_around(refuses, around, said):
    q = jnp.ones((1, 4, 2, 8))
    with refuses("around must be an Around, with three norms or None, not", said):
        ops.linear_angular_attention(q, q, q, around=around)


def test_the_kernels_take_no_empty_arrays(refuses):
    q = jnp.ones((0, 4, 2, 8))
    with refuses("the kernels take no empty q, k and v"):
        ops.linear_angular_attention(q, q, q, implementation="pallas")
    assert ops.linear_angular_attention(q, q, q).shape == q.shape


def test_a_norm_of_another_shape(refuses):
    q, k, v, taps, *_ = test_tpu.draw(SHAPE)
    norms = draw_norms(SHAPE)
    with refuses("the norm of k must have the shape (3, 2, 16), not (3, 2, 32)."):
        ops.linear_angular_attention(q, k, v, taps, around=ops.Around((norms[0], norms[2], norms[2])))
