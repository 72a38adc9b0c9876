"""The table of attention kinds, and attentions that a user registers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax.convert.inference_folder import save_inference
from castling_jax.data.arrays import ArrayDataset
from castling_jax.models import description
from castling_jax.models.attention.core import Kind, Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.macs import Cost, count_costs
from castling_jax.models.registry import abstract_model, attentions_of
from castling_jax.models.variables import flatten, get_variables
from castling_jax.training.config import default_config
from castling_jax.training.setup import first_state, first_variables, set_up
from tests.models import small
from tests.ops import reference

BUILDERS = {"deit": small.small_model, "levit": small.small_levit, "mvitv2": small.small_mvit}


@pytest.fixture(autouse=True)
def the_table_as_it_was(monkeypatch):
    """What a test registers is gone after it, and so are the small models that were built with it."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)
    for build in BUILDERS.values():
        build.cache_clear()


# An attention of one's own: the weights are the cosines between queries and keys, divided by the number of keys.


def cosine_attention(q, k, v):
    q, k = (x / (1e-6 + jnp.linalg.norm(x, axis=-1, keepdims=True)) for x in (q, k))
    return jnp.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v) / k.shape[1]


def gated_attention(q, k, v, *, mask_threshold, bias=None):
    """The same, and a softmax branch that a threshold closes."""
    bias = 0 if bias is None else castling_jax.ops.masked_softmax.dense_bias(bias)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
    kept = (weights > mask_threshold) & (mask_threshold < 1)
    out = cosine_attention(q, k, v) + jnp.einsum("bhqk,bkhd->bqhd", jnp.where(kept, weights, 0), v)
    return out, jnp.mean(kept)


def register_both():
    castling_jax.register_attention("cosine", cosine_attention)
    castling_jax.register_attention("gated", gated_attention, inference="cosine")


def cosine_in_float64(q, k, v):
    return np.einsum("bhqk,bkhd->bqhd", reference.scores_of(*map(reference.normalize, (q, k))) / k.shape[1], v)


@pytest.mark.parametrize(
    "family", ["deit", *(pytest.param(other, marks=pytest.mark.slow) for other in ("levit", "mvitv2"))]
)
def test_a_registered_attention_becomes_another_at_the_switch_in_every_backbone(family):
    register_both()
    model, left = (BUILDERS[family](attention="gated", form=form) for form in ("train", "inference"))
    variables = small.random_variables(model)
    # What only the bias is made of goes with the branch; in a DeiT there is nothing.
    paths = flatten(variables)
    assert any("/softmax_branch/" in path for path in paths) == (family != "deit")
    assert sum(path.endswith("/token_kernel") for path in paths) == {"deit": 2, "levit": 3, "mvitv2": 4}[family]
    switched = castling_jax.to_inference(variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(switched, get_variables(left))
    alone = castling_jax.to_inference(get_variables(BUILDERS[family](attention="cosine")))
    chex.assert_trees_all_equal_shapes_and_dtypes(switched, alone)
    images = jax.random.normal(jax.random.key(0), (2, model.spec.image_size, model.spec.image_size, 3))
    report = castling_jax.check_switch(model, variables, images, 0.05)
    assert np.all((report["densities"] > 0) & (report["densities"] < 1))
    # At 1 the branch is closed: what is left is float32's rounding, of batch norm's folding too.
    assert report["max_difference_at_one"] < 1e-4 < report["max_difference"]


def test_a_registered_attention_computes_its_function_and_the_taps():
    register_both()
    core = castling_jax.models.attention.kinds.make_core("cosine", "train", token_conv="1d")
    module = MultiHeadAttention(24, 3, core, small.layers(), qkv_bias=True)
    rng = np.random.default_rng(0)
    taps = rng.normal(size=(9, 3))
    module.token_kernel[...] = jnp.asarray(taps, jnp.float32)
    x = rng.normal(size=(2, 17, 24))
    out, density = module(jnp.asarray(x, jnp.float32), places=Places((4, 4), 1), mask_threshold=None)
    qkv = x @ np.asarray(module.qkv.kernel[...], np.float64)
    q, k, v = np.moveaxis(qkv.reshape(2, 17, 3, 3, 8), 2, 0)
    by_hand = cosine_in_float64(q, k, v) + reference.convolve_tokens(v, taps)
    expected = by_hand.reshape(2, 17, 24) @ np.asarray(module.proj.kernel[...], np.float64)
    # Sums of 8 to 24 float32 terms, and the epsilon of 1e-6 beside norms of a tenth and more.
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.max(np.abs(expected)))
    assert float(density) == 0


@pytest.mark.slow
def test_a_registered_attention_is_counted_and_described():
    register_both()
    model = small.small_model(attention="cosine", depth=1)
    tokens, width, head_dim = 17, 24, 8
    costs = count_costs(model)
    # einsum takes K^T V first, so this attention is linear in tokens.
    assert costs["cosine"] == Cost(2 * tokens * width * head_dim, width * head_dim + tokens * width)
    assert costs["token_kernel"] == Cost(9 * tokens * width, tokens * width)
    assert "other" not in costs
    text = description.describe(castling_jax.create_model("deit_micro", attention="cosine", depth=1))
    assert "cosine" in text.split("one image's forward pass")[1].split("parameters")[0]


@pytest.mark.slow
def test_a_registered_attention_is_trained_on_a_mesh_and_read_back(tmp_path):
    register_both()
    config = default_config()
    config.model.update({"name": "deit_micro", "attention": "gated", "depth": 1, "embed_dim": 16})
    config.train.batch_size = config.evaluation.batch_size = 8
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(8, 8, 8, 3)).astype(np.float32)
    data = ArrayDataset(images, np.arange(8) % 3, 3)
    setup = set_up(config, jax.devices()[:1], (data, data))
    assert setup.shardings.params["blocks"]["0"]["attn"]["token_kernel"].spec == jax.P(None, "tensor")
    state = first_state(setup, first_variables(setup))
    before = jax.tree.map(np.asarray, state.params)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(8) % 3}
    state, metrics = setup.train_step(state, batch, 0.05)
    assert np.isfinite(metrics["loss"])
    assert 0 < float(metrics["mask_density"][0]) < 1
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params)
    assert moved["blocks"]["0"]["attn"]["token_kernel"]

    left = abstract_model(**setup.model.spec.arguments(form="inference"))
    switched = castling_jax.to_inference(jax.tree.map(np.asarray, state.variables))
    save_inference(tmp_path / "inference", left, switched)
    model, variables = castling_jax.load_inference(tmp_path / "inference")
    assert (model.spec.attention, model.spec.form) == ("gated", "inference")
    chex.assert_trees_all_equal(variables, switched)


def test_a_name_of_ones_own_may_be_registered_again():
    castling_jax.register_attention("mine", cosine_attention)
    castling_jax.register_attention("mine", lambda q, k, v: v, taps=False)
    assert not any("token_kernel" in path for path in flatten(get_variables(small.small_model(attention="mine"))))


def test_a_functions_output_is_cast_to_the_dtype_of_the_values():
    castling_jax.register_attention("wide", lambda q, k, v: v.astype(jnp.float32), taps=False)
    v = jnp.ones((1, 2, 3, 4), jnp.bfloat16)
    chex.assert_type(KINDS["wide"](v, v, v)[0], jnp.bfloat16)


@pytest.mark.parametrize("token_conv", ["1d", "2d"])
def test_a_function_gets_the_inputs_that_it_takes(token_conv):
    given = {}

    def with_kernel(q, k, v, *, token_kernel, grid, prefix_tokens, implementation):
        given.update(kernel=token_kernel.shape, grid=grid, prefix=prefix_tokens, implementation=implementation)
        return v

    def without(q, k, v, grid=None, prefix_tokens=0, query_values=None):
        given.update(grid=grid, prefix=prefix_tokens)
        return v

    castling_jax.register_attention("with_kernel", with_kernel)
    castling_jax.register_attention("without", without)
    for name in ("with_kernel", "without"):
        model = small.small_model(attention=name, token_conv=token_conv, depth=1, implementation="xla")
        jax.eval_shape(functools.partial(castling_jax.apply, model), get_variables(model), small.random_images())
        # A function that applies the taps itself gets the grid as `depthwise_convolution` takes it.
        on_grid = name == "without" or token_conv == "2d"
        assert (given["grid"], given["prefix"]) == (((4, 4), 1) if on_grid else (None, 0))
    assert (given["kernel"], given["implementation"]) == ((9, 3) if token_conv == "1d" else (3, 3, 3), "xla")


# What the table has room for: parameters of a kind's own, and modules in the place of multi-head attention


def test_a_kind_may_have_parameters_of_its_own():
    def scaled(q, k, v, *, temperature):
        return cosine_attention(q, k, v) * temperature[:, None]

    def parameters(module, layers):
        assert (module.key_dim, module.value_dim) == (8, 8)
        return {"temperature": nnx.Param(jnp.full((module.num_heads,), 2.0, layers.param_dtype))}

    KINDS["scaled"] = Kind("scaled", scaled, taps=False, parameters=parameters)
    KINDS["plain"] = Kind("plain", cosine_attention, taps=False)
    model, plain = (small.small_model(attention=name, depth=1) for name in ("scaled", "plain"))
    variables = small.random_variables(model)
    leaf = variables["params"]["blocks"]["0"]["attn"].pop("temperature")
    images = small.random_images()
    expected = castling_jax.apply(plain, variables, images)
    variables["params"]["blocks"]["0"]["attn"]["temperature"] = jnp.ones_like(leaf)
    np.testing.assert_allclose(castling_jax.apply(model, variables, images), expected, rtol=1e-6)
    variables["params"]["blocks"]["0"]["attn"]["temperature"] = leaf
    assert not np.allclose(castling_jax.apply(model, variables, images), expected, rtol=1e-3)


class MeanOfTokens(nnx.Module):
    """A module in the place of multi-head attention."""

    def __init__(self, dim, num_heads, core, layers, *, qkv_bias):
        self.proj = layers.linear(dim, dim)

    def __call__(self, x, *, places, mask_threshold):
        return jnp.broadcast_to(self.proj(x.mean(axis=1, keepdims=True)), x.shape), jnp.zeros(())


def test_a_kind_may_bring_a_module_which_plain_transformers_take(refuses):
    KINDS["mean"] = Kind("mean", cosine_attention, taps=False, module=MeanOfTokens)
    model = small.small_model(attention="mean")
    attn = get_variables(model)["params"]["blocks"]["0"]["attn"]
    assert attn.keys() == {"proj"}
    logits, densities = castling_jax.apply(
        model, small.random_variables(model), small.random_images(), return_densities=True
    )
    assert logits.shape == (2, 7)
    chex.assert_trees_all_equal(densities, jnp.zeros(2))
    for build, name in ((small.small_levit, "levit_128s"), (small.small_mvit, "mvitv2_tiny")):
        with refuses("attention='mean' is for plain transformers", name, "deit_small"):
            build(attention="mean")
        assert "mean" not in attentions_of(name)
    assert "mean" in attentions_of("deit_tiny")


def test_every_built_in_kind_names_its_inference_kind_and_its_tables():
    kinds = {name: (kind.at_inference.name, kind.tables, kind.taps) for name, kind in KINDS.items()}
    assert kinds == {
        "castling": ("linear_angular", "softmax_branch", True),
        "linear_angular": ("linear_angular", None, True),
        "softmax": ("softmax", "module", False),
        "angular": ("angular", None, True),
        "softmax_taps": ("softmax_taps", "module", True),
        "relu_linear": ("relu_linear", None, False),
        "bridge": ("bridge", "module", False),
        "convolutional": ("convolutional", "module", False),
        "separable": ("separable", None, False),
        "window": ("window", "module", False),
        "relu_linear_taps": ("relu_linear_taps", None, True),
        "focused_linear": ("focused_linear", None, True),
        "taylor": ("linear_taylor", "softmax_branch", False),
        "linear_taylor": ("linear_taylor", None, False),
        "performer": ("performer", None, False),
    }
    assert all(dataclasses.is_dataclass(kind) and hash(kind) for kind in KINDS.values())


@pytest.mark.parametrize("value_dim", [8, 16])
def test_softmax_scores_are_not_rounded_to_bfloat16(value_dim):
    """Scores up to about 50, which bfloat16 would round by a tenth; JAX's own function takes the values of eight."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(scale * rng.normal(size=(2, 12, 3, dim)), jnp.bfloat16) for scale, dim in
               ((4, 8), (4, 8), (1, value_dim)))  # fmt: skip
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    weights = reference.softmax(reference.scaled_scores(*wide[:2]))
    expected = np.einsum("bhqk,bkhd->bqhd", weights, wide[2])
    # The weights are rounded, the partial sums and the result: 2^-9 of each, and no more of the scores' size.
    bound = 2**-7 * np.einsum("bhqk,bkhd->bqhd", weights, np.abs(wide[2])) + 1e-6
    actual = np.asarray(KINDS["softmax"].function(q, k, v), np.float64)
    assert np.all(np.abs(actual - expected) <= bound)


# Refusals


@pytest.mark.parametrize(
    ("name", "function", "options", "fragments"),
    [
        ("two words", cosine_attention, {}, ["written like a Python name", "'two words'"]),
        (3, cosine_attention, {}, ["written like a Python name", "3"]),
        ("softmax", cosine_attention, {}, ["'softmax' is built in", "another name"]),
        ("mine", "cosine", {}, ["must be a function of (q, k, v), not 'cosine'"]),
        ("mine", lambda q, k: q, {}, ["must take (q, k, v), not (q, k)"]),
        ("mine", lambda q, k, v, treshold: q, {}, ["input of the attention 'mine' 'treshold'", "'mask_threshold'"]),
        ("mine", cosine_attention, {"inference": "liner_angular"}, ["attention 'liner_angular'", "'linear_angular'"]),
        ("mine", cosine_attention, {"inference": "castling"}, ["inference='castling' changes at the switch itself"]),
        ("mine", cosine_attention, {"inference": "softmax"}, ["inference='softmax' has taps=False"]),
        (
            "mine",
            cosine_attention,
            {"inference": "softmax_taps"},
            ["'softmax_taps' takes a bias, which 'mine' does not"],
        ),
    ],
)
def test_what_cannot_be_registered(refuses, name, function, options, fragments):
    before = dict(KINDS)
    with refuses(*fragments):
        castling_jax.register_attention(name, function, **options)
    assert before == KINDS


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda q, k, v: v[:, :1], "(2, 1, 3, 8)"),
        (lambda q, k, v: None, "NoneType"),
        (lambda q, k, v: (v, 0.0, v), "(2, 17, 3, 8) and float and (2, 17, 3, 8)"),
    ],
)
def test_a_function_that_returns_something_else(refuses, function, said):
    castling_jax.register_attention("mine", function)
    model = small.small_model(attention="mine")
    with refuses("the attention 'mine' must return", "(2, 17, 3, 8)", said):
        castling_jax.apply(model, small.random_variables(model), small.random_images())


def test_a_registered_attention_that_needs_a_threshold_asks_for_it(refuses):
    register_both()
    model = small.small_model(attention="gated")
    with refuses("a gated model in training form needs mask_threshold"):
        castling_jax.apply(model, small.random_variables(model), small.random_images())


def test_a_model_whose_attention_is_not_registered(refuses):
    with refuses("unknown attention 'cosine'"):
        abstract_model("deit_micro", attention="cosine")
