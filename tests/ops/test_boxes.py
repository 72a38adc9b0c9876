import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from castling_jax import ops

PAIRWISE = {name: jax.jit(getattr(ops, name)) for name in ("box_iou", "generalized_box_iou")}
# Without area, a point, as small as float32 allows, inverted, and far away, beside ordinary ones.
ODD = [[3, 3, 3, 9], [3, 3, 3, 3], [0, 0, 1e-19, 1e-19], [0, 0, 1e-9, 1e-9], [5, 5, 2, 2], [1e4, 1e4, 1e4 + 1, 1e4 + 8]]


def draw(seed, count=12):
    low = np.random.default_rng(seed).uniform(-20, 20, (count, 2))
    return np.concatenate([low, low + np.random.default_rng(seed + 1).uniform(0, 30, (count, 2))], axis=1)


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def reference(a, b, generalized):
    """One pair, in Python's float64."""
    inter = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - inter
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    ratio = inter / union if union else 0
    return ratio - (hull - union) / hull if generalized and hull else ratio


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_pair_as_written_down(name):
    a, b = (
        draw(0).astype(np.float32),
        np.concatenate([draw(2), draw(0)[:3], [[3, 3, 3, 9], [5, 5, 2, 2]]], dtype=np.float32),
    )
    expected = [[reference(x, y, name != "box_iou") for y in b.astype(float)] for x in a.astype(float)]
    # Coordinates up to 50 are exact to 3e-6, so areas of some 100 are to 3e-7 of themselves, and ratios add up a few.
    np.testing.assert_allclose(PAIRWISE[name](jnp.asarray(a), jnp.asarray(b)), expected, rtol=0, atol=2e-6)


def test_what_the_ratios_are_by_hand():
    a = np.float32([[0, 0, 4, 4], [3, 3, 3, 9]])
    b = np.float32([[0, 0, 4, 4], [0, 0, 4, 2], [8, 0, 12, 4], [3, 3, 3, 9]])
    np.testing.assert_array_equal(PAIRWISE["box_iou"](a, b), np.float32([[1, 0.5, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(PAIRWISE["generalized_box_iou"](a, b)[0], [1, 0.5, -1 / 3, -20 / 36], atol=1e-7)
    points = np.float32([[1, 1, 1, 1], [2, 2, 2, 2], [1, 5, 1, 5]])
    np.testing.assert_array_equal(PAIRWISE["generalized_box_iou"](points, points)[0], [0, -1, 0])


@pytest.mark.parametrize("name", PAIRWISE)
def test_leading_axes_broadcast(name):
    a, b = jnp.asarray(draw(0), jnp.float32).reshape(3, 4, 4), jnp.asarray(draw(2), jnp.float32)
    out = PAIRWISE[name](a, b)
    assert out.shape == (3, 4, 12)
    for image, boxes in zip(out, a, strict=True):
        np.testing.assert_array_equal(image, PAIRWISE[name](boxes, b))
    np.testing.assert_array_equal(jax.vmap(PAIRWISE[name], (0, None))(a, b), out)


@pytest.mark.parametrize("name", PAIRWISE)
def test_half_precision_is_widened_first(name):
    a, b = jnp.asarray(draw(0), jnp.bfloat16), jnp.asarray(draw(2), jnp.bfloat16)
    out = PAIRWISE[name](a, b)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, PAIRWISE[name](a.astype(jnp.float32), b.astype(jnp.float32)))


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_gradient_is_finite_everywhere(name):
    boxes = jnp.asarray(np.concatenate([draw(0), ODD]), jnp.float32)
    jacobian = jax.jit(jax.jacobian(PAIRWISE[name], argnums=(0, 1)))(boxes, boxes)
    assert all(np.isfinite(part).all() for part in jacobian)
    assert np.isfinite(PAIRWISE[name](boxes, boxes)).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_gradient_is_the_slope(name):
    a, b = draw(0, 4), draw(2, 3)
    weights = np.random.default_rng(5).standard_normal((4, 3))

    def total(x):
        pairs = itertools.product(x, b)
        return weights.ravel() @ [reference(*pair, name != "box_iou") for pair in pairs]

    steps = 1e-6 * np.eye(a.size).reshape(-1, *a.shape)
    slopes = [(total(a + step) - total(a - step)) / 2e-6 for step in steps]
    gradient = jax.jit(jax.grad(lambda x: (weights * PAIRWISE[name](x, jnp.asarray(b, jnp.float32))).sum()))
    actual = gradient(jnp.asarray(a, jnp.float32))
    # Slopes of up to 0.1 a pixel; float32 loses 1e-7 of areas' quotients, several times.
    np.testing.assert_allclose(np.ravel(actual), slopes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*PAIRWISE, "non_maximum_suppression"])
def test_an_explicit_mesh_splits_the_batch(name):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    boxes, scores = jnp.asarray(draw(0), jnp.float32).reshape(3, 4, 4), jnp.ones((3, 4, 4))

    def call(a, b):
        if name in PAIRWISE:
            return getattr(ops, name)(a, b)
        return ops.non_maximum_suppression(a, b, score_threshold=0.1, iou_threshold=0.5, max_detections=3)

    second = boxes if name in PAIRWISE else scores
    placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))) for x in (boxes, second)]
    out = jax.jit(call)(*placed)
    assert {jax.typeof(leaf).sharding.spec[0] for leaf in jax.tree.leaves(out)} == {"data"}
    jax.tree.map(np.testing.assert_array_equal, out, jax.jit(call)(boxes, second))


@pytest.mark.parametrize("name", PAIRWISE)
def test_what_are_no_boxes(refuses, name):
    boxes = jnp.ones((3, 4))
    with refuses("a must be [..., boxes, 4]", "(3, 5)"):
        PAIRWISE[name](jnp.ones((3, 5)), boxes)
    with refuses("b must be [..., boxes, 4]", "(4,)"):
        PAIRWISE[name](boxes, boxes[0])
    with refuses("b must be of a floating type", "int32"):
        PAIRWISE[name](boxes, boxes.astype(jnp.int32))
