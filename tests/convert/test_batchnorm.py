import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from castling_jax.convert.batchnorm import EPSILON, fold_batch_norms
from tests.convert import trees


def random_batch_norm(features, seed=0):
    parameters, statistics = trees.as_dtype(
        dict(enumerate(trees.batch_norm(np.random.default_rng(seed), features))), np.float32
    ).values()
    norm = nnx.BatchNorm(features, use_running_average=True, epsilon=EPSILON, rngs=nnx.Rngs(0))
    norm.scale, norm.bias = (nnx.Param(jnp.asarray(parameters[name])) for name in ("scale", "bias"))
    norm.mean, norm.var = (nnx.BatchStat(jnp.asarray(statistics[name])) for name in ("mean", "var"))
    return norm, parameters, statistics


def draw(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def fold(layer, norm, statistics):
    return fold_batch_norms({"node": {"linear": layer, "bn": norm}}, {"node": {"bn": statistics}})["node"]["linear"]


def test_epsilon_is_that_of_the_papers_models():
    assert EPSILON == 1e-5


def test_after_a_linear_layer():
    layer = nnx.Linear(5, 7, use_bias=False, rngs=nnx.Rngs(0))
    norm, parameters, statistics = random_batch_norm(7)
    folded = fold({"kernel": layer.kernel[...]}, parameters, statistics)
    x = draw(4, 3, 5)
    # Outputs of order ten, of 5 terms, in two float32 computations.
    chex.assert_trees_all_close(x @ folded["kernel"] + folded["bias"], norm(layer(x)), rtol=0, atol=5e-6)


def test_before_a_linear_layer():
    layer = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    layer.bias = nnx.Param(jnp.asarray(draw(7)))
    norm, parameters, statistics = random_batch_norm(5)
    folded = fold({"kernel": layer.kernel[...], "bias": layer.bias[...]}, parameters, statistics)
    x = draw(4, 3, 5)
    chex.assert_trees_all_close(x @ folded["kernel"] + folded["bias"], layer(norm(x)), rtol=0, atol=5e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_after_a_convolution(groups):
    def convolution(use_bias):
        return nnx.Conv(4, 8, (3, 3), strides=2, feature_group_count=groups, use_bias=use_bias, rngs=nnx.Rngs(0))

    layer, folded_layer = convolution(False), convolution(True)
    norm, parameters, statistics = random_batch_norm(8)
    folded = fold({"kernel": layer.kernel[...]}, parameters, statistics)
    folded_layer.kernel, folded_layer.bias = (nnx.Param(folded[name]) for name in ("kernel", "bias"))
    x = draw(2, 7, 7, 4)
    # The zero padding comes before the batch norm: the fold is exact at the borders too.
    chex.assert_trees_all_close(folded_layer(x), norm(layer(x)), rtol=0, atol=1e-5)


def test_a_convolution_after_batch_norm_is_refused(refuses):
    # Its zero padding would have to become the batch norm's shift: no convolution with a bias does that.
    norm, statistics = trees.batch_norm(np.random.default_rng(0), 4)
    with refuses("node", "kernel"):
        fold({"kernel": draw(3, 3, 4, 8), "bias": draw(8)}, norm, statistics)


def test_a_whole_tree_against_float64():
    variables = trees.levit_like()
    del variables["params"]["head_dist"], variables["batch_stats"]["head_dist"]
    folded = fold_batch_norms(variables["params"], variables["batch_stats"])
    doubled = {part: variables[part] | {"head_dist": variables[part]["head"]} for part in variables}
    expected = trees.folded_by_hand(doubled)["params"]
    expected["blocks"]["0"]["attn"]["softmax_branch"] = variables["params"]["blocks"]["0"]["attn"]["softmax_branch"]
    chex.assert_trees_all_equal_structs(folded, expected)
    chex.assert_trees_all_close(trees.as_dtype(folded, np.float64), expected, rtol=0, atol=3e-6)


def test_what_is_not_folded_is_the_same_object_and_the_input_is_not_changed():
    variables = trees.levit_like()
    before = copy.deepcopy(variables)
    folded = fold_batch_norms(variables["params"], variables["batch_stats"])
    attention = [tree["blocks"]["0"]["attn"] for tree in (folded, variables["params"])]
    assert attention[0]["token_kernel"] is attention[1]["token_kernel"]
    assert attention[0] is not attention[1]
    chex.assert_trees_all_equal(variables, before)


def test_a_tree_without_batch_norm_passes_through():
    tree = {"a": {"kernel": draw(2, 3)}, "b": draw(2)}
    folded = fold_batch_norms(tree, {})
    assert folded["a"]["kernel"] is tree["a"]["kernel"]
    assert folded["b"] is tree["b"]


def test_what_stands_beside_a_batch_norm_stays():
    norm, statistics = trees.batch_norm(np.random.default_rng(0), 3)
    node = {"linear": {"kernel": draw(2, 3)}, "bn": norm, "token_kernel": draw(9, 3)}
    folded = fold_batch_norms({"node": node}, {"node": {"bn": statistics}})["node"]
    assert folded.keys() == {"linear", "token_kernel"}
    assert folded["token_kernel"] is node["token_kernel"]


@pytest.mark.parametrize(
    ("collection", "path"),
    [
        ("params", ("stem", "bn", "scale")),
        ("params", ("stem", "bn", "bias")),
        ("batch_stats", ("head", "bn", "mean")),
        ("batch_stats", ("head", "bn", "var")),
        ("params", ("stem", "linear", "kernel")),
        ("params", ("stem", "linear")),
        ("batch_stats", ("stem", "bn")),
        ("batch_stats", ("stem",)),
    ],
)
def test_an_incomplete_batch_norm_is_refused(refuses, collection, path):
    variables = trees.levit_like()
    node = variables[collection]
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    with refuses(f"{collection}/{path[0]}", "missing", path[-1] if path[-1] != "stem" else "bn"):
        fold_batch_norms(variables["params"], variables["batch_stats"])


@pytest.mark.parametrize("path", [("ghost",), ("blocks", "ghost"), ("blocks", "0", "ghost")])
def test_statistics_without_parameters_are_refused(refuses, path):
    variables = trees.levit_like()
    node = variables["batch_stats"]
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = {"bn": {"mean": np.zeros(4), "var": np.ones(4)}}
    with refuses("batch_stats", "/".join(path)):
        fold_batch_norms(variables["params"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("collection", "node", "leaf", "said"),
    [
        ("params", "stem", ("bn", "scale", np.ones(7)), "'params/stem/bn/scale' is (7,), not (4,)"),
        ("batch_stats", "head", ("bn", "var", np.ones(1)), "'batch_stats/head/bn/var' is (1,), not (6,)"),
        ("params", "stem", ("bn", "count", np.ones(4)), "'params/stem/bn/count' is not known there"),
    ],
)
def test_a_batch_norm_of_other_arrays_is_refused(refuses, collection, node, leaf, said):
    variables = trees.levit_like()
    child, name, array = leaf
    variables[collection][node][child][name] = array
    with refuses(said):
        fold_batch_norms(variables["params"], variables["batch_stats"])


@pytest.mark.parametrize(("params", "batch_stats"), [({"a": {}}, {"a": np.ones(3)}), ({"a": np.ones(3)}, {"a": {}})])
def test_statistics_where_there_is_no_node_are_refused(refuses, params, batch_stats):
    with refuses("'a' must be a dict of arrays both in params and in batch_stats"):
        fold_batch_norms(params, batch_stats)


def test_it_works_under_jit():
    variables = trees.levit_like()
    compiled = jax.jit(fold_batch_norms)(variables["params"], variables["batch_stats"])
    plain = fold_batch_norms(variables["params"], variables["batch_stats"])
    chex.assert_trees_all_close(compiled, plain, rtol=1e-6, atol=1e-6)
