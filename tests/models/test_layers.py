import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from castling_jax.models.layers import Mlp, PatchEmbed, drop_path, layer_norm, linear, normal_parameter
from tests.models import small

FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    rate, samples = 0.3, 20_000
    out = np.asarray(drop_path(jnp.ones((samples, 2, 3)), rate, jax.random.key(0)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - rate))}
    assert np.all(out == out[:, :1, :1])
    # Five standard deviations of a mean of so many coins.
    assert abs(out.mean() - 1) < 5 * math.sqrt(rate / (1 - rate) / samples)


def test_drop_path_without_a_key_or_a_rate_does_nothing():
    x = jnp.ones((4, 2))
    assert drop_path(x, 0.5, None) is x
    assert drop_path(x, 0.0, jax.random.key(0)) is x


def test_drop_path_follows_its_key_and_keeps_the_dtype():
    x = jnp.ones((64, 2), jnp.bfloat16)
    first, again, other = (drop_path(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_type(first, jnp.bfloat16)
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(first != other)


@pytest.mark.parametrize("hidden", [5, 16])
def test_mlp_has_the_exact_gelu(hidden):
    mlp = Mlp(4, hidden, rngs=nnx.Rngs(0), **FLOAT32)
    # Of a size where the tanh approximation of the GELU is off by up to 5e-4.
    x = 3 * np.random.default_rng(0).normal(size=(2, 7, 4))
    kernel = np.random.default_rng(1).normal(size=(4, hidden))
    mlp.fc1.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    hidden_values = small.gelu(x @ np.asarray(mlp.fc1.kernel[...], np.float64))
    expected = hidden_values @ np.asarray(mlp.fc2.kernel[...], np.float64)
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=2e-6)


def test_patch_embed_is_one_product_a_patch():
    embed = PatchEmbed(2, 3, 5, rngs=nnx.Rngs(0), **FLOAT32)
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    tokens = embed(jnp.asarray(images, jnp.float32))
    kernel = np.asarray(embed.proj.kernel[...], np.float64).reshape(12, 5)
    # Tokens in the order of the grid's rows.
    patches = [images[:, y : y + 2, x : x + 2].reshape(2, 12) for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_allclose(tokens, np.stack(patches, axis=1) @ kernel, rtol=0, atol=1e-6)


def test_layer_norm_has_deits_epsilon():
    x = np.asarray([[1e-3, -1e-3, 2e-3, 0.0]])
    expected = small.layer_norm(x, {"scale": 1.0, "bias": 0.0})
    out = layer_norm(4, rngs=nnx.Rngs(0), **FLOAT32)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


def test_matrices_start_from_a_normal_and_biases_from_zero():
    layer = linear(200, 300, rngs=nnx.Rngs(0), **FLOAT32)
    token = normal_parameter(nnx.Rngs(0), (1, 1, 60_000), jnp.float32)
    for values in (layer.kernel[...], token[...]):
        # The deviation of 60,000 draws is known to 0.3 %.
        assert np.std(values) == pytest.approx(0.02, rel=0.02)
        assert abs(np.mean(values)) < 5 * 0.02 / math.sqrt(60_000)
    chex.assert_trees_all_equal(layer.bias[...], jnp.zeros(300))
    assert linear(2, 3, use_bias=False, rngs=nnx.Rngs(0), **FLOAT32).bias is None
