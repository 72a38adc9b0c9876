import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.models.variables import bind, count_parameters, flatten, get_variables, leaves_of, unflatten
from tests.models import small

MODEL = small.small_model()
VARIABLES = small.random_variables(MODEL)
IMAGES = small.random_images()
apply = jax.jit(lambda variables, images, t: castling_jax.apply(MODEL, variables, images, mask_threshold=t))


@pytest.mark.parametrize("kind", ["castling", "linear_angular", "softmax", "angular"])
@pytest.mark.parametrize("distilled", [False, True])
def test_variables_are_nested_plain_dicts_with_string_keys(kind, distilled):
    def check(tree):
        if isinstance(tree, dict):
            assert type(tree) is dict
            assert all(type(key) is str for key in tree)
            for child in tree.values():
                check(child)
        else:
            assert hasattr(tree, "shape")

    variables = get_variables(small.small_model(attention=kind, distilled=distilled))
    check(variables)
    assert variables.keys() == {"params"}
    assert variables["params"]["blocks"].keys() == {"0", "1"}
    assert ("token_kernel" in variables["params"]["blocks"]["0"]["attn"]) == (kind != "softmax")
    # A DeiT's branch owns no parameter.
    assert not any("softmax_branch" in path for path in flatten(variables))


def test_variables_are_the_models_own_arrays():
    model = castling_jax.create_model("deit_micro", **small.SIZES)
    variables = get_variables(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    assert variables["params"]["cls_token"] is model.cls_token[...]


def test_flatten_and_unflatten_are_inverse_and_sorted():
    flat = flatten(VARIABLES)
    assert list(flat) == sorted(flat)
    assert flat["params/blocks/0/norm1/scale"] is VARIABLES["params"]["blocks"]["0"]["norm1"]["scale"]
    chex.assert_trees_all_equal(unflatten(flat), VARIABLES)


def test_parameters_are_counted_without_batch_statistics():
    assert count_parameters({"params": {"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}, "batch_stats": {}}) == 10


def test_apply_is_pure_and_ignores_the_models_own_parameters():
    real = castling_jax.create_model("deit_micro", **small.SIZES)
    before = jax.tree.map(np.array, get_variables(real))
    given = jax.tree.map(np.array, VARIABLES)
    compiled = jax.jit(castling_jax.apply, static_argnums=0)
    logits = compiled(real, VARIABLES, IMAGES, mask_threshold=0.06)
    chex.assert_trees_all_equal(get_variables(real), before)
    chex.assert_trees_all_equal(VARIABLES, given)
    # MODEL holds shapes only.
    chex.assert_trees_all_equal(compiled(MODEL, VARIABLES, IMAGES, mask_threshold=0.06), logits)


def test_bind_returns_a_copy_with_the_variables():
    real = castling_jax.create_model("deit_micro", **small.SIZES)
    bound = bind(real, VARIABLES)
    assert bound is not real
    assert bound.spec == real.spec
    chex.assert_trees_all_equal(get_variables(bound), VARIABLES)


def test_jit_changes_nothing_and_a_new_threshold_does_not_compile_again():
    plain, densities = castling_jax.apply(MODEL, VARIABLES, IMAGES, mask_threshold=0.06, return_densities=True)
    chex.assert_shape([plain, densities], [(2, 7), (2,)])
    # Some 60 float32 sums, which compiled together are ordered differently.
    chex.assert_trees_all_close(apply(VARIABLES, IMAGES, 0.06), plain, rtol=0, atol=1e-4)
    for threshold in (0.0, 0.3, 1.0):
        apply(VARIABLES, IMAGES, threshold)
    assert apply._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_variables_and_images_may_be_numpy_arrays(dtype):
    images = np.asarray(IMAGES, np.float16).astype(dtype)
    logits = apply(jax.tree.map(np.asarray, VARIABLES), images, 0.06)
    chex.assert_trees_all_equal(logits, apply(VARIABLES, jnp.asarray(images), 0.06))
    chex.assert_tree_all_finite(logits)


@pytest.mark.parametrize("kind", ["linear_angular", "softmax", "angular"])
def test_kinds_without_a_branch_ignore_the_threshold(kind):
    model = small.small_model(attention=kind, depth=1)
    variables = small.random_variables(model)
    plain, densities = castling_jax.apply(model, variables, IMAGES, return_densities=True)
    chex.assert_trees_all_equal(castling_jax.apply(model, variables, IMAGES, mask_threshold=-1.0), plain)
    chex.assert_trees_all_equal(densities, jnp.zeros(1))


# Refusals


@pytest.mark.parametrize(
    ("threshold", "fragments"),
    [
        (None, ["needs mask_threshold", "at least 0"]),
        (-0.5, ["mask_threshold", "-0.5", "at least 0"]),
        (float("nan"), ["mask_threshold", "nan", "at least 0"]),
        (jnp.zeros(2), ["mask_threshold", "scalar", "(2,)"]),
    ],
)
def test_a_threshold_that_is_missing_or_no_threshold(refuses, threshold, fragments):
    with refuses(*fragments):
        castling_jax.apply(MODEL, VARIABLES, IMAGES, mask_threshold=threshold)


@pytest.mark.parametrize("threshold", [-0.5, float("nan")])
def test_a_traced_threshold_is_not_seen(threshold):
    chex.assert_tree_all_finite(apply(VARIABLES, IMAGES, threshold))


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 1, 8, 8, 3), (0, 8, 8, 3)])
def test_images_without_a_batch(refuses, shape):
    with refuses("images must be [batch, height, width, channels]", str(shape)):
        castling_jax.apply(MODEL, VARIABLES, jnp.zeros(shape), mask_threshold=0.1)


def test_any_mapping_is_flattened():
    assert flatten(types.MappingProxyType({"params": types.MappingProxyType({"a": 1})})) == {"params/a": 1}


@pytest.mark.parametrize("on_mesh", ["images", "variables", "both"])
def test_arrays_on_a_plain_mesh(on_mesh):
    mesh = jax.make_mesh((1,), ("data",))  # of Explicit axes; tests/models/meshes.py has more devices
    rows, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    variables = VARIABLES if on_mesh == "images" else jax.device_put(VARIABLES, everywhere)
    images = IMAGES if on_mesh == "variables" else jax.device_put(IMAGES, rows)
    expected = apply(VARIABLES, IMAGES, 0.06)
    logits = apply(variables, images, 0.06)
    with jax.set_mesh(mesh):
        chex.assert_trees_all_equal(apply(variables, images, 0.06), logits)
    # One device: at most another order of sums of 24 to 96 numbers, of logits of size 1.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert jax.typeof(logits).sharding.spec == jax.P(None if on_mesh == "variables" else "data", None)


def changed(path, leaf=None):
    """VARIABLES with another leaf at the path, or without the path."""
    leaves = {other: value for other, value in flatten(VARIABLES).items() if other != path}
    return unflatten(leaves if leaf is None else leaves | {path: leaf})


@pytest.mark.parametrize(
    ("variables", "fragments"),
    [
        ({}, ["lack 'params/", "missing"]),
        ([], ['takes variables such as {"params": ...} as variables, not list.']),
        (VARIABLES["params"], ["lack 'params/"]),
        (changed("params/blocks/1/mlp/fc2/bias"), ["lack 'params/blocks/1/mlp/fc2/bias'", "1 of "]),
        (changed("params/head_dist/bias", jnp.zeros(7)), ["'params/head_dist/bias'", "does not have"]),
        (changed("batch_stats/bn/mean", jnp.zeros(7)), ["'batch_stats/bn/mean'", "does not have"]),
        (changed("params/cls_token", jnp.zeros((1, 24))), ["'params/cls_token'", "(1, 1, 24)", "(1, 24)"]),
        (changed("params/cls_token", 0.5), ["'params/cls_token'", "(1, 1, 24), not float"]),
    ],
    ids=["empty", "a list", "params alone", "missing", "unknown", "batch_stats", "shape", "a number"],
)
def test_variables_that_are_not_the_models(refuses, variables, fragments):
    with refuses(*fragments):
        leaves_of(MODEL, variables)
    with refuses(*fragments):
        castling_jax.apply(MODEL, variables, IMAGES, mask_threshold=0.1)
