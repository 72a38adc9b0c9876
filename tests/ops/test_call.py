"""Kernels called by name: absent arrays, aliases, and names that stand twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from castling_jax.ops.tpu.call import ABSENT, call, whole

X, Y = jnp.arange(8.0).reshape(1, 8), jnp.full((1, 8), 100.0)


def subtract(refs):
    """out = x - y, kept in scratch memory on the way; without y, out = x."""
    refs.memory[...] = refs.x[...]
    if refs.y is not None:
        refs.memory[...] -= refs.y[...]
        refs.negative[...] = -refs.memory[...]
    refs.out[...] = refs.memory[...]


def run(y, **options):
    inputs = {"y": ABSENT if y is None else whole(y), "x": whole(X)}
    outputs = {"negative": inputs["y"], "out": inputs["x"]}
    scratch = {"memory": pltpu.VMEM(X.shape, X.dtype)}
    return call(subtract, inputs=inputs, outputs=outputs, scratch=scratch, interpret=True, **options)


def test_refs_have_the_names_of_their_arrays():
    outputs = run(Y)
    np.testing.assert_array_equal(outputs["out"], X - Y)
    np.testing.assert_array_equal(outputs["negative"], Y - X)


def test_an_absent_array_is_none_in_the_kernel_and_in_the_results():
    outputs = run(None)
    assert outputs["negative"] is None
    np.testing.assert_array_equal(outputs["out"], X)


@pytest.mark.parametrize(("y", "aliases"), [(Y, ((0, 0), (1, 1))), (None, ((0, 0),))])
def test_aliases_are_numbers_of_the_present_arrays(y, aliases):
    jaxpr = jax.make_jaxpr(lambda: run(y, aliases={"y": "negative", "x": "out"}))().jaxpr
    (equation,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    assert equation.params["input_output_aliases"] == aliases


def test_a_name_that_stands_twice():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'x'"):
        call(subtract, inputs={"x": whole(X)}, outputs={"x": whole(X)}, interpret=True)
