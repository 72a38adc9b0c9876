import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from castling_jax import ops
from castling_jax.models.attention.core import Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.attention.kinds import make_core
from tests.models import small
from tests.ops import reference


def attention_module(dim=24, num_heads=3, *, attention="castling", form="train", qkv_bias=True, **core):
    core = make_core(attention, form, **({"token_conv": "1d"} | core))
    return MultiHeadAttention(dim, num_heads, core, small.layers(), qkv_bias=qkv_bias)


def call(module, x, threshold=None, grid=(4, 4), prefix_tokens=1):
    @jax.jit
    def function(x, threshold):
        return module(x, places=Places(grid, prefix_tokens), mask_threshold=threshold)

    return function(x, threshold)


@pytest.mark.parametrize(("number", "form"), [(0, "linear"), (1, "castling"), (2, "castling")])
def test_agrees_with_the_authors_block(golden, number, form):
    file = golden(f"official_attention_{number}_{form}")
    weights, x = file.group("weights"), file["input"]
    module = attention_module(
        x.shape[2],
        file.meta["num_heads"],
        form="train" if form == "castling" else "inference",
        qkv_bias=file.meta["qkv_bias"],
        token_kernel_size=file.meta["res_kernel_size"],
    )
    for name in ("qkv", "proj"):
        layer = getattr(module, name)
        layer.kernel = nnx.Param(jnp.asarray(weights[f"{name}.weight"].T))
        if f"{name}.bias" in weights:
            layer.bias = nnx.Param(jnp.asarray(weights[f"{name}.bias"]))
    module.token_kernel = nnx.Param(jnp.asarray(weights["dconv.weight"][:, 0, :, 0].T))
    out, density = call(module, jnp.asarray(x), file.meta["threshold"])
    # Two float32 computations of some thousand sums of 32 to 197 terms.
    np.testing.assert_allclose(out, file["output"], rtol=0, atol=2e-6 * np.max(np.abs(file["output"])))
    assert float(density) == pytest.approx(float(file.get("mask_density", 0.0)), rel=1e-6)


@pytest.mark.parametrize("token_conv", ["1d", "2d", None])
def test_angular_is_the_kernel_with_the_normalisation_and_taps_of_linear_angular(token_conv):
    module = attention_module(attention="angular", token_conv=token_conv)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 17, 24)), jnp.float32)
    if token_conv is not None:
        taps = jnp.asarray(rng.normal(size=module.token_kernel.shape), jnp.float32)
        module.token_kernel = nnx.Param(taps)
    out, density = call(module, x)
    q, k, v = jnp.moveaxis((x @ module.qkv.kernel[...]).reshape(2, 17, 3, 3, 8), 2, 0)
    attended = np.asarray(ops.angular_attention(q, k, v), np.float64)
    by_hand = reference.normalize(attended)
    if token_conv == "1d":
        by_hand = by_hand + np.asarray(ops.depthwise_convolution(v, taps))
    if token_conv == "2d":
        by_hand = by_hand + np.asarray(ops.depthwise_convolution(v, taps, grid=(4, 4), prefix_tokens=1))
    expected = by_hand.reshape(2, 17, 24) @ np.asarray(module.proj.kernel[...], np.float64)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.max(np.abs(expected)))
    assert float(density) == 0


@pytest.mark.parametrize(
    ("token_conv", "size", "shape"),
    [("1d", None, (9, 3)), ("1d", 5, (5, 3)), ("2d", None, (3, 3, 3)), ("2d", 5, (5, 5, 3)), ("2d", 1, (1, 1, 3))],
)
def test_the_token_kernel_starts_at_zero(token_conv, size, shape):
    kernel = attention_module(token_conv=token_conv, token_kernel_size=size).token_kernel[...]
    chex.assert_trees_all_equal(kernel, jnp.zeros(shape))


@pytest.mark.parametrize("arguments", [{"attention": "softmax"}, {"token_conv": None}])
def test_no_token_kernel_where_there_is_no_convolution(arguments):
    assert attention_module(**arguments).token_kernel is None


@pytest.mark.parametrize("kind", ["castling", "linear_angular"])
def test_form_makes_a_difference_to_castling_alone(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 17, 24)), jnp.float32)
    trained, density = call(attention_module(attention=kind), x, 0.0)
    inferred, none = call(attention_module(attention=kind, form="inference"), x)
    assert float(density) == pytest.approx(1 if kind == "castling" else 0, abs=1e-6)
    assert float(none) == 0
    assert bool(jnp.all(trained == inferred)) == (kind != "castling")


# Refusals


def test_castling_in_training_form_needs_a_threshold(refuses):
    with refuses("mask_threshold", "at least 0"):
        call(attention_module(), jnp.ones((1, 17, 24)))


def test_heads_that_do_not_divide_the_width(refuses):
    with refuses("5 heads", "24"):
        small.small_model(num_heads=5)


@pytest.mark.parametrize("size", [4, 6])
def test_an_even_token_kernel(refuses, size):
    with refuses("token_kernel_size", "odd", str(size)):
        small.small_model(token_kernel_size=size)


@pytest.mark.parametrize(
    ("argument", "value", "nearest"),
    [("attention", "castle", "castling"), ("form", "infer", "inference"), ("token_conv", "3d", "2d")],
)
def test_unknown_names(refuses, argument, value, nearest):
    with refuses(argument, repr(value), nearest):
        small.small_model(**{argument: value})
