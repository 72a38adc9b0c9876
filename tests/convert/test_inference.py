import copy
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import castling_jax
from castling_jax import to_inference
from castling_jax.convert.inference import SOFTMAX_BRANCH
from castling_jax.models.registry import MODELS, abstract_model
from castling_jax.models.variables import flatten, get_variables
from tests.convert import trees
from tests.models import small

KINDS = ["castling", "linear_angular", "softmax", "angular"]


def same_objects(one, other):
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(one[path] is other[path] for path in one)


# The switch


@pytest.mark.parametrize(("token_conv", "distilled"), [("1d", False), ("2d", True), (None, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_exactly_the_inference_models(kind, token_conv, distilled):
    def variables(form):
        return get_variables(small.small_model(attention=kind, token_conv=token_conv, distilled=distilled, form=form))

    chex.assert_trees_all_equal(to_inference(variables("train")), variables("inference"))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("token_conv", "distilled"), [("2d", True), ("1d", False), (None, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_levits_tree_is_exactly_the_inference_models(kind, token_conv, distilled, param_dtype):
    def variables(form):
        arguments = {"attention": kind, "token_conv": token_conv, "distilled": distilled, "param_dtype": param_dtype}
        return get_variables(small.small_levit(form=form, **arguments))

    chex.assert_trees_all_equal_shapes_and_dtypes(to_inference(variables("train")), variables("inference"))


@pytest.mark.parametrize("kind", ["castling", "softmax"])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("levit")])
def test_every_levits_tree_is_exactly_the_inference_models(name, kind):
    def variables(form):
        return get_variables(abstract_model(name, attention=kind, form=form, distilled=True))

    switched = to_inference(variables("train"))
    chex.assert_trees_all_equal_shapes_and_dtypes(switched, variables("inference"))
    assert switched.keys() == {"params"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_exactly_the_inference_mvitv2s(kind):
    trained, inference = (get_variables(small.small_mvit(attention=kind, form=form)) for form in ("train", "inference"))
    chex.assert_trees_all_equal(to_inference(trained), inference)


@pytest.mark.parametrize("name", ["mvitv2_tiny", "mvitv2_small", "mvitv2_base"])
def test_every_mvitv2_loses_its_relative_positions_and_no_more(name):
    trained, inference = (get_variables(abstract_model(name, form=form)) for form in ("train", "inference"))
    chex.assert_trees_all_equal(jax.eval_shape(to_inference, trained), inference)
    assert {path.split("/")[-2] for path in flatten(trained).keys() - flatten(inference).keys()} == {"softmax_branch"}


@pytest.mark.parametrize("name", MODELS)
def test_every_models_switched_tree_is_its_inference_forms(name):
    trained, inference = (get_variables(abstract_model(name, form=form)) for form in ("train", "inference"))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(to_inference, trained), inference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deit_keeps_its_arrays(kind):
    variables = small.random_variables(small.small_model(attention=kind, distilled=True))
    switched = to_inference(variables)
    assert same_objects(switched, variables)
    assert switched["params"] is not variables["params"]


def test_the_switched_model_computes_what_training_computes_at_threshold_one():
    model = small.small_model()
    variables, images = small.random_variables(model), small.random_images()
    trained = castling_jax.apply(model, variables, images, mask_threshold=1.0)
    switched = castling_jax.apply(small.small_model(form="inference"), to_inference(variables), images)
    # Without jit, and with the branch known to be empty, both run the very same operations.
    chex.assert_trees_all_equal(trained, switched)


def test_branch_batch_norms_and_second_head_are_gone():
    variables = trees.levit_like()
    switched = to_inference(variables)
    expected = trees.folded_by_hand(variables)
    chex.assert_trees_all_equal_structs(switched, expected)
    chex.assert_trees_all_close(trees.as_dtype(switched, np.float64), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_branch_is_dropped_wherever_it_stands(depth):
    inner = {"kept": np.ones(2), "softmax_branch": {"table": np.ones(3), "deeper": {"gate": np.ones(1)}}}
    expected = {"kept": inner["kept"]}
    for level in range(depth):
        inner, expected = {str(level): inner}, {str(level): expected}
    assert same_objects(to_inference({"params": inner}), {"params": expected})


def test_a_batch_norm_within_the_branch_goes_with_its_statistics():
    variables = trees.levit_like()
    norm, statistics = trees.batch_norm(np.random.default_rng(0), 4)
    branch = {"gate": {"linear": {"kernel": np.ones((2, 4))}, "bn": norm}}
    variables["params"]["blocks"]["0"]["attn"]["softmax_branch"] = branch
    variables["batch_stats"]["blocks"]["0"]["attn"]["softmax_branch"] = {"gate": {"bn": statistics}}
    chex.assert_trees_all_equal(to_inference(variables), to_inference(trees.levit_like()))


def test_two_heads_with_a_distillation_token_stay_two():
    variables = trees.levit_like()
    variables["params"]["dist_token"] = np.zeros((1, 1, 4), np.float32)
    switched = to_inference(variables)["params"]
    assert {"head", "head_dist", "dist_token"} <= switched.keys()


def test_one_head_stays_as_it_is():
    head = {"kernel": np.ones((2, 3)), "bias": np.ones(3)}
    assert same_objects(to_inference({"params": {"head": head}}), {"params": {"head": head}})


def test_plain_heads_are_averaged_too():
    heads = [{"kernel": np.full((2, 3), value), "bias": np.full(3, value)} for value in (1.0, 4.0)]
    switched = to_inference({"params": {"head": heads[0], "head_dist": heads[1]}})
    chex.assert_trees_all_equal(
        switched, {"params": {"head": {"kernel": np.full((2, 3), 2.5), "bias": np.full(3, 2.5)}}}
    )


def test_the_input_is_never_changed():
    variables = trees.levit_like()
    before, leaves = copy.deepcopy(variables), flatten(variables)
    to_inference(variables, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(variables, before)
    assert all(leaf is leaves[path] for path, leaf in flatten(variables).items())


def test_switching_twice_is_switching_once():
    switched = to_inference(trees.levit_like())
    assert same_objects(to_inference(switched), switched)


# Kinds of leaves


def test_numpy_and_jax_arrays_and_jit_agree():
    variables = trees.levit_like()
    plain = to_inference(variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(plain))
    arrays = to_inference(jax.tree.map(jnp.asarray, variables))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
    # Sums of six terms at the most.
    chex.assert_trees_all_close(arrays, plain, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(jax.jit(to_inference)(variables), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_shapes_alone_are_enough(dtype):
    variables = trees.levit_like()
    switch = functools.partial(to_inference, dtype=dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    for abstract in (switch(shapes), jax.eval_shape(switch, variables)):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, switch(variables))


def by_last_axis(leaf):
    """A sharding that says which axis is split, and so tells leaves of different rank apart; on one device here."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("abstract", [False, True])
def test_shardings_are_kept(abstract, dtype):
    def place(leaf):
        if abstract:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_last_axis(leaf))
        return jax.device_put(leaf, by_last_axis(leaf))

    switched = flatten(to_inference(jax.tree.map(place, trees.levit_like()), dtype=dtype))
    for path, leaf in switched.items():
        assert leaf.sharding == by_last_axis(leaf), path
        assert leaf.dtype == (dtype or jnp.float32), path


def test_arrays_that_follow_their_computation_still_do():
    # An array that is bound to no device may be used with arrays on any; new variables are like that.
    variables = jax.tree.map(jnp.asarray, trees.levit_like())
    assert not any(leaf.committed for leaf in jax.tree.leaves(variables))
    switched = to_inference(variables, dtype=jnp.bfloat16)
    assert not any(leaf.committed for leaf in jax.tree.leaves(switched))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, np.float32])
def test_floats_are_cast_and_others_are_not(dtype):
    params = {"a": np.ones(2, np.float32), "b": {"c": jnp.ones(2, jnp.bfloat16), "steps": np.arange(3)}}
    switched = to_inference({"params": params}, dtype=dtype)["params"]
    assert switched["a"].dtype == switched["b"]["c"].dtype == jnp.dtype(dtype)
    assert switched["b"]["steps"] is params["b"]["steps"]


# Refusals


@pytest.mark.parametrize("variables", [{}, {"batch_stats": {}}, [], None, {"blocks": {}}])
def test_a_tree_without_params(refuses, variables):
    with refuses('"params"'):
        to_inference(variables)


def test_an_unknown_collection(refuses):
    with refuses("'batch_stat'", "batch_stats"):
        to_inference({"params": {}, "batch_stat": {}})


def test_batch_norm_without_its_statistics(refuses):
    with refuses("batch_stats/", "missing"):
        to_inference({"params": trees.levit_like()["params"]})


# check_switch


THRESHOLD = 0.06


@pytest.mark.parametrize("arguments", [{"token_conv": "2d", "distilled": True}, {"dtype": "bfloat16", "depth": 1}])
def test_check_switch_is_what_two_applies_say(arguments):
    model, inference = small.small_model(**arguments), small.small_model(form="inference", **arguments)
    variables, images = small.random_variables(model), small.random_images()
    report = castling_jax.check_switch(model, variables, images, THRESHOLD)
    assert report.keys() == {"max_difference", "densities", "max_difference_at_one"}
    logits, densities = jax.jit(
        lambda v: castling_jax.apply(model, v, images, mask_threshold=THRESHOLD, return_densities=True)
    )(variables)
    switched = jax.jit(lambda v: castling_jax.apply(inference, to_inference(v), images))(variables)
    difference = jnp.max(jnp.abs(logits - switched))
    # Two float32 computations of logits of order one; in bfloat16 every logit is off by some of its roundings.
    rounding = 0.1 if "dtype" in arguments else 2e-5
    assert report["max_difference"] == pytest.approx(float(difference), abs=rounding)
    # The branch is not nothing here, and the report does not hide it.
    assert report["max_difference"] > 0.1
    chex.assert_trees_all_close(report["densities"], np.asarray(densities), rtol=0, atol=1e-6)
    assert np.all((report["densities"] > 0.05) & (report["densities"] < 0.95))
    # At one both forms add up the same terms: nothing but float32's rounding in the order of the sums is left.
    assert 0 <= report["max_difference_at_one"] <= 1e-5


@pytest.mark.parametrize("threshold", [1, 3.0])
def test_check_switch_at_one_has_no_difference(threshold):
    model = small.small_model(depth=1)
    report = castling_jax.check_switch(model, small.random_variables(model), small.random_images(), threshold)
    assert report["max_difference"] <= 1e-5
    chex.assert_trees_all_equal(report["densities"], np.zeros(1, np.float32))


@pytest.mark.parametrize("kind", ["linear_angular", "softmax", "angular"])
def test_check_switch_has_only_castling_to_compare(refuses, kind):
    model = small.small_model(attention=kind)
    with refuses('attention="castling", form="train"', repr(kind)):
        castling_jax.check_switch(model, small.random_variables(model), small.random_images(), 0.5)


def test_check_switch_needs_the_training_form(refuses):
    model = small.small_model(form="inference")
    with refuses('form="train"', "'inference'"):
        castling_jax.check_switch(model, small.random_variables(model), small.random_images(), 0.5)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), jnp.float32(-0.5)])
def test_check_switch_refuses_what_is_no_threshold(refuses, threshold):
    model = small.small_model()
    with refuses("mask_threshold", str(float(threshold)), "at least 0"):
        castling_jax.check_switch(model, small.random_variables(model), small.random_images(), threshold)


def test_check_switch_refuses_variables_that_are_not_the_models(refuses):
    model = small.small_model()
    variables = small.random_variables(model)
    del variables["params"]["head"]["bias"]
    with refuses("lack 'params/head/bias'"):
        castling_jax.check_switch(model, variables, small.random_images(), 0.5)


def test_any_mapping_is_switched():
    variables = small.random_variables(small.small_model())
    frozen = types.MappingProxyType(variables["params"] | {SOFTMAX_BRANCH: {"kernel": np.ones(2)}})
    chex.assert_trees_all_equal(to_inference({"params": frozen}), to_inference(variables))


def test_heads_that_cannot_be_averaged_are_refused(refuses):
    for params in ({}, {"head": {"kernel": np.ones((3, 2))}}):
        params["head_dist"] = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
        with refuses("'params/head' and 'params/head_dist' must have the same arrays"):
            to_inference({"params": params})


@pytest.mark.slow
def test_in_bfloat16_a_levits_forms_differ_by_its_rounding():
    # Some twenty products, one after another, are rounded to 8 bits in either form: 2^-8 each, of logits of order one.
    model = small.small_levit(dtype=jnp.bfloat16)
    found = castling_jax.check_switch(
        model, small.random_variables(model), jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), 1.0
    )
    assert 1e-4 < found["max_difference_at_one"] < 20 / 256


@pytest.mark.parametrize("params", [None, [1], {"head": {"kernel": 1.0}}])
def test_what_is_no_tree_of_arrays_is_refused(refuses, params):
    with refuses("'params", "must be nested dicts of arrays"):
        to_inference({"params": params})


@pytest.mark.parametrize("dtype", ["foo", "int32"])
def test_a_type_that_is_not_floating_is_refused(refuses, dtype):
    with refuses("dtype must be a floating type such as bfloat16", repr(dtype)):
        to_inference({"params": {}}, dtype=dtype)
