import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from castling_jax.models.batch_norm import BatchNorm, ConvNorm, LinearNorm, NormLinear
from castling_jax.models.deit import DeiTConfig, PatchEmbed
from castling_jax.models.layers import (
    Mlp,
    add_bias,
    draw_drop_path,
    drop_path,
    norm_heads,
)
from castling_jax.models.variables import forward_train
from castling_jax.ops.around import normalize_channels
from castling_jax.ops.statistics import channel_statistics
from tests.models import small


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    rate, samples = 0.3, 20_000
    drawn = draw_drop_path(jax.random.key(0), 3, samples)[2, 1]
    out = np.asarray(drop_path(jnp.ones((samples, 2, 3)), rate, drawn))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - rate))}
    assert np.all(out == out[:, :1, :1])
    # Five standard deviations of a mean of so many coins.
    assert abs(out.mean() - 1) < 5 * math.sqrt(rate / (1 - rate) / samples)


def test_drop_path_without_a_key_or_a_rate_does_nothing():
    x = jnp.ones((4, 2))
    assert draw_drop_path(None, 3, 4) is None
    assert drop_path(x, 0.5, None) is x
    assert drop_path(x, 0.0, jnp.ones(4)) is x


def test_drop_path_follows_its_key_and_keeps_the_dtype():
    x = jnp.ones((64, 2), jnp.bfloat16)
    draws = [draw_drop_path(jax.random.key(seed), 2, 64) for seed in (0, 0, 1)]
    first, again, other = (drop_path(x, 0.5, drawn[1, 0]) for drawn in draws)
    chex.assert_type(first, jnp.bfloat16)
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(first != other)
    branches = [np.asarray(drop_path(x, 0.5, drawn)) for drawn in draws[0].reshape(4, 64)]
    assert all(np.any(one != two) for one, two in itertools.combinations(branches, 2))


@pytest.mark.parametrize("hidden", [5, 16])
def test_mlp_has_the_exact_gelu(hidden):
    mlp = Mlp(4, hidden / 4, small.layers())
    # Of a size where the tanh approximation of the GELU is off by up to 5e-4.
    x = 3 * np.random.default_rng(0).normal(size=(2, 7, 4))
    kernel = np.random.default_rng(1).normal(size=(4, hidden))
    mlp.fc1.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    hidden_values = small.gelu(x @ np.asarray(mlp.fc1.kernel[...], np.float64))
    expected = hidden_values @ np.asarray(mlp.fc2.kernel[...], np.float64)
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=2e-6)


def test_patch_embed_is_one_product_a_patch():
    embed = PatchEmbed(DeiTConfig(patch_size=2, embed_dim=5, depth=1, num_heads=1), small.layers())
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    tokens = embed(jnp.asarray(images, jnp.float32))
    kernel = np.asarray(embed.proj.kernel[...], np.float64).reshape(12, 5)
    bias = np.asarray(embed.proj.bias[...], np.float64)
    # Tokens in the order of the grid's rows.
    patches = [images[:, y : y + 2, x : x + 2].reshape(2, 12) for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_allclose(tokens, np.stack(patches, axis=1) @ kernel + bias, rtol=0, atol=1e-6)


def test_layer_norm_has_deits_epsilon():
    x = np.asarray([[1e-3, -1e-3, 2e-3, 0.0]])
    expected = small.layer_norm(x, {"scale": 1.0, "bias": 0.0})
    out = small.layers().layer_norm(4)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


def test_matrices_start_from_a_normal_and_biases_from_zero():
    layer = small.layers().linear(200, 300)
    token = small.layers().embedding(1, 1, 60_000)
    for values in (layer.kernel[...], token[...]):
        # The deviation of 60,000 draws is known to 0.3 %.
        assert np.std(values) == pytest.approx(0.02, rel=0.02)
        assert abs(np.mean(values)) < 5 * 0.02 / math.sqrt(60_000)
    chex.assert_trees_all_equal(layer.bias[...], jnp.zeros(300))
    assert small.layers().linear(2, 3, use_bias=False).bias is None


def random_batch_norm(norm, seed=0):
    rng = np.random.default_rng(seed)
    numbers = {name: rng.uniform(0.5, 2, norm.scale.shape) for name in ("scale", "bias", "mean", "var")}
    for name, kind in (("scale", nnx.Param), ("bias", nnx.Param), ("mean", nnx.BatchStat), ("var", nnx.BatchStat)):
        setattr(norm, name, kind(jnp.asarray(numbers[name], jnp.float32)))
    return numbers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5), (2, 3, 4, 5)])
def test_batch_norm_in_training_and_evaluation(shape, dtype):
    norm = BatchNorm(5, small.layers())
    numbers = random_batch_norm(norm)
    x = jnp.asarray(np.random.default_rng(1).normal(2, 3, shape), dtype)
    wide = np.asarray(x, np.float64).reshape(-1, 5)
    mean, var = wide.mean(0), np.square(wide - wide.mean(0)).mean(0)
    # Of bfloat16 the output alone is rounded; the statistics are float32 in both.
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6

    def expected(mean, var):
        return ((wide - mean) / np.sqrt(var + 1e-5) * numbers["scale"] + numbers["bias"]).reshape(shape)

    evaluated = norm.normalize(x, False)
    chex.assert_type(evaluated, dtype)
    reference = expected(numbers["mean"], numbers["var"])
    np.testing.assert_allclose(np.asarray(evaluated, np.float64), reference, rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], numbers["mean"], rtol=1e-7)
    trained = norm.normalize(x, True)
    np.testing.assert_allclose(np.asarray(trained, np.float64), expected(mean, var), rtol=rounding, atol=1e-5)
    chex.assert_type([norm.mean[...], norm.var[...]], jnp.float32)
    np.testing.assert_allclose(norm.mean[...], 0.9 * numbers["mean"] + 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 * numbers["var"] + 0.1 * var, rtol=1e-6)


@pytest.mark.parametrize(("layer", "bias_in_training"), [(ConvNorm, False), (LinearNorm, False), (NormLinear, True)])
def test_batch_normed_layers_are_one_layer_at_inference(layer, bias_in_training):
    trained, folded = (layer(4, 6, small.layers(folded=folded)) for folded in (False, True))
    assert (trained.linear.bias is not None) == bias_in_training
    assert trained.bn is not None
    assert folded.linear.bias is not None
    assert folded.bn is None


@pytest.mark.parametrize(("layer", "fan_in"), [(ConvNorm, 9 * 64), (LinearNorm, 64)])
def test_batch_normed_layers_start_as_pytorchs(layer, fan_in):
    kernel = layer(64, 96, small.layers()).linear.kernel[...]
    bound = 1 / math.sqrt(fan_in)
    assert 0.99 * bound < jnp.max(jnp.abs(kernel)) <= bound
    # The deviation of a uniform; of 6,000 draws it is known to 1 %.
    assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.04)


def test_a_residual_branch_can_start_at_nothing():
    layer = LinearNorm(4, 6, small.layers(), bn_scale=0.0)
    chex.assert_trees_all_equal(layer(jnp.ones((2, 3, 4)), training=False), jnp.zeros((2, 3, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "levit", "mvitv2"])
def test_remat_changes_nothing_but_memory(name):
    build, sizes = {
        "deit": (small.small_model, {}),
        "levit": (small.small_levit, {}),
        "mvitv2": (small.small_mvit, {"depths": (1, 1)}),
    }[name]
    models = [build(remat=remat, drop_path_rate=0.2, **sizes) for remat in (False, True)]
    variables = small.random_variables(models[0])
    size = models[0].spec.image_size
    # Over fewer images, batch norm would leave gradients that are small beside what they are the difference of.
    images = jax.random.normal(jax.random.key(0), (8, size, size, 3))

    def run(model):
        def loss(params):
            logits, _, batch_stats = forward_train(
                model, variables | {"params": params}, images, mask_threshold=0.05, key=jax.random.key(1)
            )
            return jnp.sum(logits**2), batch_stats

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    kept, again = map(run, models)
    # Compiled apart, the two programs may round differently: some roundings of 6e-8 of gradients up to 100.
    chex.assert_trees_all_close(kept, again, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_norms_of_heads_are_the_same_by_products_as_by_reductions(monkeypatch, heads, dtype):
    norm = dataclasses.replace(small.layers(), dtype=dtype).layer_norm(4)
    norm.scale = nnx.Param(jnp.array([1.0, -2.0, 0.5, 3.0]))
    norm.bias = nnx.Param(jnp.array([0.0, 1.0, -1.0, 2.0]))
    x = jnp.asarray(np.random.default_rng(0).normal(0.5, 2, (2, 5, 4 * heads)), dtype)

    def both(x):
        out, backward = jax.vjp(lambda x: norm_heads(norm, x, heads), x)
        return out, backward(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(dtype))[0]

    expected, gradient = both(x)
    np.testing.assert_array_equal(expected, norm(x.reshape(2, 5, heads, 4)))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, tpu, default: tpu(*arguments))
    on_tpu, gradient_on_tpu = both(x)
    chex.assert_type([on_tpu, gradient_on_tpu], dtype)
    # Another order of sums, and a variance that is no difference, which of four numbers far from zero loses some bits.
    bound = 16 * 8 * float(jnp.finfo(dtype).eps)  # of numbers up to 8
    np.testing.assert_allclose(np.asarray(on_tpu, float), np.asarray(expected, float), rtol=0, atol=bound)
    np.testing.assert_allclose(np.asarray(gradient_on_tpu, float), np.asarray(gradient, float), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_a_biass_gradient_is_the_sum_over_tokens_in_either_way(monkeypatch, lead, dtype):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(*lead, 6)), dtype) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=6), dtype)
    expected = np.asarray(cotangent, np.float64).sum(tuple(range(len(lead))))
    # Ten numbers, and the rounding of the result.
    bound = 16 * float(jnp.finfo(dtype).eps)
    for on_tpu in (False, True):
        if on_tpu:
            monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, tpu, default: tpu(*arguments))
        out, backward = jax.vjp(add_bias, x, bias)
        np.testing.assert_array_equal(out, x + bias)
        d_x, d_bias = backward(cotangent)
        np.testing.assert_array_equal(d_x, cotangent)
        chex.assert_type(d_bias, dtype)
        np.testing.assert_allclose(np.asarray(d_bias, np.float64), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_parts_is_flaxs_of_the_whole(training):
    norm, whole = (BatchNorm(9, small.layers()) for _ in range(2))
    for one in (norm, whole):
        one.scale[...], one.bias[...] = jnp.linspace(-1, 2, 9), jnp.linspace(0, 1, 9)
        one.mean[...], one.var[...] = jnp.linspace(0, 3, 9), jnp.linspace(1, 2, 9)
    x = jnp.asarray(np.random.default_rng(0).normal(1.0, 2.0, (4, 5, 9)), jnp.float32)
    raw = jnp.split(x, [2, 7], axis=2)
    norms = jnp.split(norm.norm(channel_statistics(raw) if training else None), [2, 7], axis=1)
    parts = [normalize_channels(part, of) for part, of in zip(raw, norms, strict=True)]
    expected = nnx.BatchNorm.__call__(whole, x, use_running_average=not training)
    assert [part.shape[2] for part in parts] == [2, 5, 2]
    # Of numbers up to 6; the orders of products differ.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=2), expected, rtol=0, atol=6e-6)
    np.testing.assert_allclose(norm.mean[...], whole.mean[...], rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], whole.var[...], rtol=1e-6)


def test_a_bias_in_a_shard_map_gets_each_devices_gradient():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, bias = jnp.arange(6.0).reshape(3, 2), jnp.ones(2)

    def gradient(x, bias):
        return jax.lax.psum(jax.grad(lambda bias: jnp.sum(add_bias(x, bias) ** 2))(bias), "data")

    specs = (jax.P("data"), jax.P())
    found = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=jax.P()))(x, bias)
    np.testing.assert_allclose(found, 2 * (x + bias).sum(0))
