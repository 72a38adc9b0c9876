"""The operations on meshes with Explicit, Auto, Manual and mixed axes, of one device; tests/models/meshes.py has four.

A mesh of one device gives arrays the same types as a large one, and the same numbers as none, up to the order of sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from castling_jax import ops
from castling_jax.ops.mesh import on_auto_axes, split_as

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(RNG.standard_normal((2, 6, 2, 8)), jnp.float32) for _ in range(3))
TAPS = jnp.asarray(RNG.standard_normal((3, 2)), jnp.float32)
ALONG = jax.P("data", None, "model")
OPERATIONS = {
    "angular_kernel": lambda q, k, v, taps: ops.angular_kernel(q, k),
    "angular_kernel_series": lambda q, k, v, taps: ops.angular_kernel_series(q, k, 2),
    "angular_attention": lambda q, k, v, taps: ops.angular_attention(q, k, v),
    "depthwise_convolution": lambda q, k, v, taps: ops.depthwise_convolution(v, taps),
}
for _name in ("xla", "auto", "pallas"):
    OPERATIONS |= {
        f"linear_angular_attention, {_name}": lambda q, k, v, taps, implementation=_name: ops.linear_angular_attention(
            q, k=k, v=v, token_kernel=taps, implementation=implementation
        ),
        f"masked_softmax_attention, {_name}": lambda q, k, v, taps, implementation=_name: ops.masked_softmax_attention(
            q=q, k=k, v=v, mask_threshold=jnp.float32(0.15), implementation=implementation
        ),
        f"castling_attention, {_name}": lambda q, k, v, taps, implementation=_name: ops.castling_attention(
            q, k, v, taps, mask_threshold=0.15, implementation=implementation
        ),
    }


def mesh_of(*kinds):
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=tuple(AxisType[kind] for kind in kinds) or None)


def place(mesh):
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, ALONG)) for x in (Q, K, V)]
    return *arrays, jax.device_put(TAPS, jax.NamedSharding(mesh, jax.P(None, "model")))


def value_and_gradients(operation):
    def total(*arguments):
        out = operation(*arguments)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))


def assert_close(actual, expected):
    # Sums of up to 8 float32 numbers of size 1 to 10 in another order, and what they become in gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), actual, expected)


# Kernels, which "auto" traces too, take long to trace and compile; castling's attention calls both.
SLOW = {f"{part}_attention, {name}" for part in ("linear_angular", "masked_softmax") for name in ("auto", "pallas")}
SLOW |= {"castling_attention, pallas"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in OPERATIONS])
def test_a_plain_mesh(name):
    expected = value_and_gradients(OPERATIONS[name])(Q, K, V, TAPS)
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    assert mesh.axis_types == (AxisType.Explicit, AxisType.Explicit)
    with jax.set_mesh(mesh):
        assert_close(value_and_gradients(OPERATIONS[name])(*place(mesh)), expected)
    assert_close(value_and_gradients(OPERATIONS[name])(*place(mesh)), expected)  # the arrays know their mesh


@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Auto"), ("Auto", "Explicit")])
@pytest.mark.parametrize(
    "name", ["castling_attention, auto", pytest.param("castling_attention, pallas", marks=pytest.mark.slow)]
)
def test_other_kinds_of_axes(name, kinds):
    expected = value_and_gradients(OPERATIONS[name])(Q, K, V, TAPS)
    mesh = mesh_of(*kinds)
    with jax.set_mesh(mesh):
        assert_close(value_and_gradients(OPERATIONS[name])(*place(mesh)), expected)
    assert_close(value_and_gradients(OPERATIONS[name])(*place(mesh)), expected)


@pytest.mark.parametrize(
    "name", ["castling_attention, xla", pytest.param("linear_angular_attention, pallas", marks=pytest.mark.slow)]
)
def test_outside_of_jit(name):
    expected = OPERATIONS[name](Q, K, V, TAPS)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        assert_close(OPERATIONS[name](*place(mesh)), expected)
        assert_close(OPERATIONS[name](Q, K, V, TAPS), expected)
    assert_close(OPERATIONS[name](*place(mesh)), expected)
    assert_close(OPERATIONS[name](place(mesh)[0], K, V, TAPS), expected)  # what lies nowhere goes with the others


def test_results_are_split_as_the_first_argument():
    mesh = mesh_of()
    q, k, v, taps = place(mesh)
    out, density = jax.jit(lambda *x: ops.castling_attention(*x, mask_threshold=0.1))(q, k, v, taps)
    assert jax.typeof(out).sharding.spec == jax.P("data", None, "model", None)
    assert jax.typeof(density).sharding.spec == jax.P()
    assert jax.typeof(ops.angular_kernel(q, k)).sharding.spec == jax.P("data", "model", None, None)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(ops.angular_attention(q, k, v))))(v)
    assert jax.typeof(gradient).sharding == jax.typeof(v).sharding


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_vmap(implementation):
    mesh = mesh_of()
    q, k, v = (jax.device_put(x[None], jax.NamedSharding(mesh, jax.P(None, "data"))) for x in (Q, K, V))
    run = jax.jit(jax.vmap(functools.partial(ops.linear_angular_attention, implementation=implementation)))
    with jax.set_mesh(mesh):
        assert_close(run(q, k, v)[0], ops.linear_angular_attention(Q, K, V))


def test_vmap_of_a_dimension_that_the_mesh_splits(refuses):
    """shard_map has no axis left to split the batch over: XLA serves it, and the kernels say that they do not."""
    mesh = mesh_of()
    q, k, v = (jax.device_put(x[None], jax.NamedSharding(mesh, jax.P("data"))) for x in (Q, K, V))
    expected = ops.linear_angular_attention(Q, K, V)[None]
    out = jax.jit(jax.vmap(ops.linear_angular_attention))(q, k, v)
    assert jax.typeof(out).sharding.spec[0] == "data"
    assert_close(out, expected)
    with refuses("jax.vmap maps a dimension that the mesh splits", "its axes data, model", 'use implementation="xla"'):
        jax.jit(jax.vmap(functools.partial(ops.linear_angular_attention, implementation="pallas")))(q, k, v)


@pytest.mark.parametrize("implementation", ["xla", "auto", "pallas"])
@pytest.mark.parametrize("manual", [("data",), ("data", "model")])
def test_inside_a_shard_map(implementation, manual):
    """Manual axes have split the arrays already; an Explicit one beside them is turned into Auto."""
    mesh = mesh_of()

    def attention(q, k, v):
        return ops.linear_angular_attention(q, k, v, implementation=implementation)

    specs = jax.P("data", None, "model" if "model" in manual else None)
    mapped = jax.shard_map(
        attention, in_specs=(specs,) * 3, out_specs=specs, axis_names=set(manual), check_vma=False, mesh=mesh
    )
    with jax.set_mesh(mesh):
        assert_close(jax.jit(mapped)(*place(mesh)[:3]), ops.linear_angular_attention(Q, K, V))


def test_what_is_known_stays_known():
    """A threshold of 1 is seen while tracing: the branch is not computed. So are tokens in NumPy."""
    mesh = mesh_of()
    tokens = np.array([0, 2, 4])
    run = jax.jit(
        lambda q, k, v: ops.castling_attention(q[:, tokens], k, v, mask_threshold=1.0, query_values=tokens)[0]
    )
    with jax.set_mesh(mesh):
        arrays = place(mesh)[:3]
        assert "softmax" not in run.lower(*arrays).as_text(debug_info=True)
        assert_close(run(*arrays), ops.linear_angular_attention(Q[:, tokens], K, V, query_values=tokens))


@pytest.mark.filterwarnings("error")
def test_numpys_float64_is_jaxs_widest_type():
    q, k, v, taps = (np.asarray(x, np.float64) for x in (Q, K, V, TAPS))
    boxes, scores = np.concatenate([q[0, :, 0, :2], 5 + q[0, :, 0, 2:4]], axis=1), abs(q[0, :, 0])
    ops.generalized_box_iou(boxes, boxes)
    ops.non_maximum_suppression(boxes, scores, score_threshold=0.1, iou_threshold=0.5, max_detections=3)
    actual = ops.castling_attention(q, k, v, taps, mask_threshold=np.array(0.15), implementation="xla")
    assert_close(actual, ops.castling_attention(Q, K, V, TAPS, mask_threshold=0.15, implementation="xla"))


def test_two_meshes(refuses):
    one, other = mesh_of(), jax.make_mesh((1,), ("rows",))
    strange = jax.device_put(K, jax.NamedSharding(other, jax.P("rows")))
    with refuses("(2, 6, 2, 8) lies on a mesh of rows = 1 (Explicit)", "mesh in use, of data = 1 (Explicit) x model"):
        ops.linear_angular_attention(place(one)[0], strange, V)
    with (
        jax.set_mesh(mesh_of("Auto", "Auto")),
        refuses("not on the mesh in use, of data = 1 (Auto) x model = 1 (Auto)"),
    ):
        jax.jit(ops.angular_kernel)(strange, strange)


def test_bad_input_is_refused_as_without_a_mesh(refuses):
    with jax.set_mesh(mesh_of()):
        q, k, v, _ = place(jax.sharding.get_mesh())
        with refuses("q must be [batch, tokens, heads, dim], not of shape (6, 2, 8)"):
            ops.linear_angular_attention(q[0], k, v)
        with refuses("q must be an array, not list"):
            ops.angular_kernel([1.0], k)


def test_splitting_as_another_array():
    x = jax.device_put(Q, jax.NamedSharding(mesh_of(), ALONG))
    assert split_as(x, 2, None, 0) == jax.P("model", None, "data")
    assert split_as(x, 7) == split_as([1.0], 0) == jax.P(None)

    @on_auto_axes(lambda x: split_as(x, 0))
    def named(x, *, factor):
        return x * factor

    assert named.__name__ == "named"
    assert jax.typeof(named(factor=2.0, x=x)).sharding.spec == jax.P("data", None, None, None)
