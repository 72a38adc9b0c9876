"""The plan of the switch, against what the switch does to arrays that are changed one at a time."""

import jax
import numpy as np
import pytest

from castling_jax import convert, to_inference
from castling_jax.models.variables import flatten, unflatten
from tests.models import small

MODELS = {
    "deit": lambda: small.small_model(distilled=True),
    "levit": lambda: small.small_levit(distilled=True),
    "levit_one_head": lambda: small.small_levit(),
    "mvitv2": lambda: small.small_mvit(),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("levit")) for name in MODELS]
)
def test_an_array_changes_what_the_plan_says(name):
    variables = small.random_variables(MODELS[name]())
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    before = {path: np.asarray(leaf) for path, leaf in flatten(to_inference(unflatten(leaves))).items()}
    fates = convert.plan(variables)
    assert fates.keys() == leaves.keys()
    for path, fate in fates.items():
        changed = to_inference(unflatten(leaves | {path: leaves[path] + 1}))
        moved = {path for path, leaf in flatten(changed).items() if np.any(leaf != before[path])}
        if fate.action == "dropped":
            assert not moved
            continue
        assert fate.target in moved
        assert fate.shape == before[fate.target].shape
        if fate.action == "kept":
            assert moved == {path}
            np.testing.assert_array_equal(before[path], leaves[path])
        else:
            np.testing.assert_raises(AssertionError, np.testing.assert_array_equal, before[fate.target], leaves[path])
    assert {fate.target for fate in fates.values()} - {None} == before.keys()


def test_the_actions_of_each_family():
    actions = {name: {fate.action for fate in convert.plan(make_shapes(name)).values()} for name in MODELS}
    assert actions == {
        "deit": {"kept"},
        "levit": {"kept", "folded", "averaged", "dropped"},
        "levit_one_head": {"kept", "folded", "dropped"},
        "mvitv2": {"kept", "dropped"},
    }


def make_shapes(name):
    """Only shapes: the plan computes nothing."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small.random_variables(MODELS[name]())
    )


def test_a_tree_that_cannot_be_switched_has_no_plan(refuses):
    with refuses('the variables lack "params"'):
        convert.plan({})
    with refuses("the variables lack", '"params"'):
        convert.plan({"a": 1})
