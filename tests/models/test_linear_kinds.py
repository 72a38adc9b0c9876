"""The linear attentions that castling is compared with, each against its equation in float64 (`small.LINEAR`)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.compile_report.cases import load_case
from castling_jax.data.arrays import ArrayDataset
from castling_jax.models import description
from castling_jax.models.attention import linear
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.macs import Cost, count_costs
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten, get_variables
from castling_jax.training.config import default_config
from castling_jax.training.setup import first_state, first_variables, set_up
from tests.models import small
from tests.ops import reference

NAMES = [*small.LINEAR, "taylor"]
SHAPES = {"queries": 7, "keys": 11, "heads": 3, "key_dim": 4, "value_dim": 6}


def draw(seed=0, *, scale=1.0, queries=7, keys=11, heads=3, key_dim=4, value_dim=6):
    rng = np.random.default_rng(seed)
    q, k = (scale * rng.normal(size=(2, tokens, heads, key_dim)) for tokens in (queries, keys))
    return q, k, rng.normal(size=(2, keys, heads, value_dim))


def inputs_of(name, threshold=0.1):
    """What the function takes besides q, k and v."""
    scales = jnp.asarray(np.random.default_rng(5).normal(size=(SHAPES["heads"], SHAPES["key_dim"])), jnp.float32)
    return {"taylor": {"mask_threshold": threshold}, "focused_linear": {"focus_scale": scales}}.get(name, {})


def run(name, *arrays, **inputs):
    out, density = KINDS[name](*(jnp.asarray(x, jnp.float32) for x in arrays), **inputs_of(name), **inputs)
    return out, density


def expected_of(name, q, k, v, threshold=0.1, bias=None):
    if name == "taylor":
        return small.taylor(q, k, v, threshold, bias)
    parameters = {word: np.asarray(value, np.float64) for word, value in inputs_of(name).items()}
    return small.LINEAR[name](q, k, v, parameters), 0.0


# Values


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_kind_is_its_equation_where_queries_are_not_the_keys_tokens(name, scale):
    q, k, v = draw(scale=scale)
    out, density = run(name, q, k, v)
    expected, expected_density = expected_of(name, q, k, v)
    # Sums of at most 11 terms; exponents and scores of up to some 30 times the rounding of 6e-8.
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6 * np.max(np.abs(expected)))
    assert float(density) == pytest.approx(expected_density, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_computes_in_float32_what_is_in_bfloat16(name):
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in draw()]
    out, _ = KINDS[name](*(jnp.asarray(x, jnp.bfloat16) for x in arrays), **inputs_of(name))
    assert out.dtype == jnp.bfloat16
    expected, _ = expected_of(name, *arrays)
    # The output's own rounding, half of 2^-8 of each element, and float32's before it.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5 * np.max(np.abs(expected)))


def test_taylor_at_threshold_zero_is_softmax_attention_with_its_bias():
    q, k, v = draw()
    bias = np.random.default_rng(1).normal(size=(1, 3, 7, 11))
    out, density = linear.taylor_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask_threshold=0.0, bias=jnp.asarray(bias, jnp.float32)
    )
    weights = reference.softmax(reference.scaled_scores(q, k, bias))
    # Taylor's weights are added and taken away again: two roundings more than a softmax has.
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", weights, v), rtol=0, atol=2e-6)
    assert float(density) == 1


def test_linear_taylor_is_softmax_attention_to_first_order():
    differences = []
    for scale in (0.1, 0.05):
        q, k, v = draw(scale=scale)
        weights = reference.softmax(reference.scaled_scores(q, k))
        softmax = np.einsum("bhqk,bkhd->bqhd", weights, v)
        differences.append(np.max(np.abs(small.taylor(q, k, v, 1.0)[0] - softmax)))
    # Scores go with the square of the scale, and the error with the square of the scores.
    assert differences[0] / differences[1] == pytest.approx(16, rel=0.2)


def test_taylors_mask_is_strict_and_passes_no_gradient_of_its_own():
    # Uniform weights of 1/8 sit on the threshold; with equal keys Taylor's weights are the same 1/8.
    q, k, v = draw(queries=3, keys=8, key_dim=4)
    q, v = jnp.asarray(q, jnp.float32), jnp.asarray(v, jnp.float32)
    k = jnp.ones_like(jnp.asarray(k, jnp.float32))
    tie = 0.125
    assert float(linear.taylor_attention(q, k, v, mask_threshold=tie)[1]) == 0
    assert float(linear.taylor_attention(q, k, v, mask_threshold=np.nextafter(tie, 0, dtype=np.float32))[1]) == 1

    def total(t, q):
        return jnp.sum(jnp.sin(linear.taylor_attention(q, k + jnp.cos(q.sum()), v, mask_threshold=t)[0]))

    assert float(jax.grad(total)(jnp.float32(0.1), q)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name):
    """In float64, along a random direction."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in draw()]
        inputs = {word: jnp.asarray(value, jnp.float64) for word, value in inputs_of(name).items()}

        @jax.jit
        def total(*arrays):
            return jnp.sum(jnp.sin(KINDS[name](*arrays, **inputs)[0]))

        directions = [jnp.asarray(x) for x in draw(seed=1)]
        gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
        slope = sum(float(jnp.vdot(a, b)) for a, b in zip(gradients, directions, strict=True))
        step = 1e-5
        above, below = (
            float(total(*(x + sign * step * d for x, d in zip(arrays, directions, strict=True)))) for sign in (1, -1)
        )
    # The error is step^2 times third derivatives, and for performer 1e-6 times a feature: its maxima are constants.
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5)


# Performer's estimate


@pytest.mark.slow
def test_performer_converges_to_softmax_attention():
    q, k, v = draw(scale=0.5)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    softmax = np.einsum("bhqk,bkhd->bqhd", reference.softmax(reference.scaled_scores(q, k)), v)
    counts = [4**i for i in range(2, 8)]
    errors = [
        np.sqrt(np.mean(np.square(linear.favor_attention(*arrays, linear.random_directions(count, 4)) - softmax)))
        for count in counts
    ]
    # An estimate's deviation falls with the root of the number of its features; these are six draws of it. A bias,
    # as of directions that are not uniform, would stay.
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.005 * np.max(np.abs(softmax))


def test_performers_directions_are_orthogonal_constants_of_a_normals_norms():
    found = linear.random_directions(256, 64)
    np.testing.assert_array_equal(found, linear.random_directions.__wrapped__(256, 64))
    for block in np.split(found, 4):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        np.testing.assert_allclose(unit @ unit.T, np.eye(64), atol=1e-13)
    # chi-squared of 64 degrees has the mean 64 and the deviation sqrt(128); of 256 of them, the mean is off by 0.7.
    assert np.mean(np.square(found).sum(axis=1)) == pytest.approx(64, abs=4 * 0.7)
    # No direction is preferred: a mean of 16,384 rows of deviation 1 is off by 1/128, 64 of them by up to 4 times that.
    assert np.max(np.abs(linear.random_directions(2**14, 64).mean(axis=0))) < 4 / 128
    assert linear.random_directions(5, 4).shape == (5, 4)


def test_performer_has_no_hidden_randomness():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw())
    np.random.seed(1)
    first = linear.performer_attention(q, k, v)
    np.random.seed(2)
    chex.assert_trees_all_equal(first, linear.performer_attention(q, k, v))


@pytest.mark.parametrize("scale", [1e-12, 30.0, 1e3])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("taylor", "linear_taylor")])
def test_weights_stay_weights_at_any_size(name, scale):
    """Outputs are weighted means of the values, or nearer to zero; gradients are finite."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(scale=scale))
    out, pullback = jax.vjp(lambda *x: KINDS[name](*x, **inputs_of(name))[0], q, k, v)
    low, high = jnp.min(v, axis=1, keepdims=True), jnp.max(v, axis=1, keepdims=True)
    slack = 1e-5
    assert bool(jnp.all((out >= jnp.minimum(low, 0) - slack) & (out <= jnp.maximum(high, 0) + slack)))
    chex.assert_tree_all_finite(pullback(jnp.ones_like(out)))


# Zero vectors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", ["a query", "a key", "all"])
def test_zero_vectors_have_finite_gradients(name, zero):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw())
    if zero == "all":
        q, k, v = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    q = q.at[0, 1].set(0) if zero == "a query" else q
    k = k.at[0, 1].set(0) if zero == "a key" else k
    out, pullback = jax.vjp(lambda *x: KINDS[name](*x, **inputs_of(name))[0], q, k, v)
    expected, _ = expected_of(name, *(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    gradients = pullback(jnp.ones_like(out))
    chex.assert_tree_all_finite(gradients)
    assert max(float(jnp.max(jnp.abs(gradient))) for gradient in gradients) < 1e3
    if name == "focused_linear" and zero == "a query":
        chex.assert_trees_all_equal((out[0, 1], gradients[0][0, 1]), (jnp.zeros((3, 6)), jnp.zeros((3, 4))))


def test_relu_linear_of_a_query_that_no_key_answers_is_zero_with_finite_gradients():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 4)), jnp.float32).at[0, 1].set(-1.0)
    k, v = jnp.abs(q) + 1, jnp.ones((1, 3, 1, 2))

    def total(q, k, v):
        return jnp.sum(jnp.sin(linear.relu_linear_attention(q, k, v)))

    chex.assert_trees_all_equal(linear.relu_linear_attention(q, k, v)[0, 1], jnp.zeros((1, 2)))
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)
    chex.assert_trees_all_equal(gradients[0][0, 1], jnp.zeros((1, 4)))


# Models


@pytest.mark.parametrize("name", [name for name in NAMES if name != "taylor"])
def test_the_cost_is_linear_in_tokens(name):
    assert KINDS[name].linear
    model = small.small_model(attention=name, depth=1)
    (part,) = KINDS[name].parts
    costs = [count_costs(model, image_size=size) for size in (8, 16, 32)]
    tokens = [1 + (size // 2) ** 2 for size in (8, 16, 32)]
    assert all("other" not in cost for cost in costs[:1])
    # MACs per token are one number: twice the tokens are exactly twice the MACs.
    assert (
        len({(cost[part].macs / count, cost[part].macs % count) for cost, count in zip(costs, tokens, strict=True)})
        == 1
    )


def test_each_kinds_macs_are_counted_by_hand():
    tokens, width, heads, dim = 17, 24, 3, 8
    features = dim * 2  # round(ln 8) = 2
    expected = {
        "relu_linear_taps": 2 * tokens * width * dim + tokens * width,
        "focused_linear": 2 * tokens * width * dim + tokens * width,
        "linear_taylor": 2 * tokens * width * dim,
        "performer": 4 * tokens * width * features + tokens * heads * features,
    }
    for name, macs in expected.items():
        assert count_costs(small.small_model(attention=name, depth=1))[KINDS[name].parts[0]].macs == macs, name
    costs = count_costs(small.small_model(attention="taylor", depth=1))
    assert costs["taylor_branch"] == Cost(2 * tokens**2 * width, heads * tokens**2 + tokens * width)
    assert costs["linear_taylor"].macs == expected["linear_taylor"]
    assert "other" not in costs


@pytest.mark.parametrize("name", [name for name in NAMES if name != "taylor"])
def test_the_switch_leaves_their_trees_as_they_are(name):
    variables = small.random_variables(small.small_model(attention=name))
    chex.assert_trees_all_equal(castling_jax.to_inference(variables), variables)
    left = get_variables(small.small_model(attention=name, form="inference"))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, left)


@pytest.mark.parametrize(
    "build",
    [
        small.small_model,
        *(pytest.param(build, marks=pytest.mark.slow) for build in (small.small_levit, small.small_mvit)),
    ],
)
def test_taylor_drops_its_branch_at_the_switch(build):
    model = build(attention="taylor")
    variables = small.random_variables(model)
    assert any("/softmax_branch/" in path for path in flatten(variables)) == (build is not small.small_model)
    left = get_variables(build(attention="taylor", form="inference"))
    chex.assert_trees_all_equal_shapes_and_dtypes(castling_jax.to_inference(variables), left)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        left, get_variables(build(attention="linear_taylor", form="inference"))
    )
    size = model.spec.image_size
    report = castling_jax.check_switch(model, variables, small.random_images(2, size, size), 0.03)
    assert np.all(report["densities"] > 0)
    assert np.min(report["densities"]) < 1
    # At 1 the branch adds zeros: what is left is float32's rounding, of batch norm's folding too.
    assert report["max_difference_at_one"] < (1e-4 if build is small.small_levit else 1e-6)
    assert report["max_difference"] > 1e-2


def test_taylors_empty_branch_is_not_computed_where_that_is_known():
    model = small.small_model(attention="taylor", depth=1)
    variables, images = get_variables(model), small.random_images()

    def programs(*thresholds):
        run = functools.partial(castling_jax.apply, model, return_densities=True)
        forms = [functools.partial(run, mask_threshold=threshold) for threshold in thresholds]
        return [str(jax.make_jaxpr(form)(variables, images)) for form in forms]

    with_branch, without = programs(0.5, 1.0)
    # Scores of 17 x 17 tokens; linear attention has none.
    assert "17,17]" in with_branch
    assert "17,17]" not in without


def test_focused_attentions_scales_are_its_own(refuses):
    model = small.small_model(attention="focused_linear")
    scale = get_variables(model)["params"]["blocks"]["0"]["attn"]["focus_scale"]
    assert scale.shape == (3, 8)
    state_dict = castling_jax.convert.to_torch(
        small.small_model(attention="softmax"), small.random_variables(small.small_model(attention="softmax"))
    )
    with refuses("focus_scale"):
        castling_jax.convert.from_torch(model, state_dict)
    # The others take a softmax model's weights; taps start at zero.
    for name in ("relu_linear_taps", "performer", "taylor"):
        taken = castling_jax.convert.from_torch(small.small_model(attention=name), state_dict)
        chex.assert_trees_all_equal_shapes(taken, get_variables(small.small_model(attention=name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["focused_linear", "taylor"])
def test_a_training_step_moves_its_parameters_on_a_mesh(name):
    config = default_config()
    config.model.update({"name": "deit_micro", "attention": name, "depth": 1, "embed_dim": 16})
    config.train.batch_size = config.evaluation.batch_size = 8
    images = np.random.default_rng(0).uniform(size=(8, 8, 8, 3)).astype(np.float32)
    data = ArrayDataset(images, np.arange(8) % 3, 3)
    setup = set_up(config, jax.devices()[:1], (data, data))
    state = first_state(setup, first_variables(setup))
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = setup.train_step(state, {"image": jnp.asarray(images), "label": jnp.arange(8) % 3}, 0.02)
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params)["blocks"]["0"]["attn"]
    assert moved["qkv"]["kernel"]
    if name == "focused_linear":
        assert moved["focus_scale"]
        assert setup.shardings.params["blocks"]["0"]["attn"]["focus_scale"].spec == jax.P("tensor", None)
    else:
        assert 0 < float(metrics["mask_density"][0]) <= 1


def test_describe_lists_them():
    text = description.describe(abstract_model("deit_micro", attention="taylor", depth=1))
    table = text.split("one image's forward pass")[0]
    assert {line.split()[0] for line in table.splitlines() if line.startswith("  ")} >= set(NAMES)
    assert "Taylor's sparse branch" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_compilers_report_takes_them(name):
    for form in ("train", "inference"):
        case = load_case("layer", {"attention": name, "form": form, "tokens": 5, "batch": 2}, [])
        out = jax.eval_shape(case.function, *case.arguments)
        assert jax.tree.leaves(out)[0].shape == (2, 5, 768)
    assert abstract_model("deit_tiny", attention=name).spec.attention == name
