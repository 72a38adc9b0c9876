import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.points import decode_boxes, level_points


@pytest.mark.parametrize(("image_size", "number"), [(416, 3598), (320, 2125), ((160, 224), 747)])
def test_the_numbers_that_picodet_has(image_size, number):
    points, strides, counts = level_points(image_size)
    assert len(points) == len(strides) == sum(counts) == number


def test_points_and_boxes_of_the_reference(golden):
    file = golden("dense/picodet_v2")
    points, strides, counts = level_points((160, 224))
    np.testing.assert_array_equal(points, file["points"])
    np.testing.assert_array_equal(strides, file["strides"])
    assert counts == tuple(rows * columns for rows, columns in file.meta["level_sizes"])
    boxes = decode_boxes(jnp.asarray(file["reg_logits"]), points, strides)
    # Distances up to 448 px have a step of 3e-5, and the softmax's rounding is of that size.
    np.testing.assert_allclose(boxes, file["boxes"], rtol=0, atol=2e-4)


def test_the_last_points_may_lie_past_the_image():
    points, strides, counts = level_points((96, 40))
    assert counts == (12 * 5, 6 * 3, 3 * 2, 2 * 1)
    np.testing.assert_array_equal(points[-2:], [[32, 32], [32, 96]])
    np.testing.assert_array_equal(points[60:63], [[8, 8], [24, 8], [40, 8]])
    np.testing.assert_array_equal(strides[[0, 59, 60, 78, 84]], [8, 8, 16, 32, 64])


def test_one_bin_is_its_distance():
    logits = jnp.where(jnp.arange(8) == jnp.asarray([1, 0, 7, 4])[:, None], 60.0, 0.0).reshape(1, 32)
    box = decode_boxes(logits, np.float32([[100, 50]]), np.float32([16]))
    np.testing.assert_allclose(box, [[84, 50, 212, 114]], atol=1e-4)
    half = decode_boxes(logits.astype(jnp.bfloat16), np.float32([[100, 50]]), np.float32([16]))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, box)  # 60 and 0 are bfloat16 numbers
    assert np.isfinite(
        jax.jit(jax.jacobian(decode_boxes))(1e6 * logits, np.float32([[100, 50]]), np.float32([16]))
    ).all()


@pytest.mark.parametrize("image_size", [0, 3.5, (32,), (32, -8), "416"])
def test_an_image_size_that_is_none(refuses, image_size):
    with refuses("image_size must be a positive integer or (height, width)", repr(image_size)):
        level_points(image_size)


def test_shapes_that_do_not_fit(refuses):
    points, strides = np.ones((5, 2), np.float32), np.ones(5, np.float32)
    with refuses("reg_logits must have the shape (5, 28), not (5, 30)."):
        decode_boxes(jnp.ones((5, 30)), points, strides)
    with refuses("points must have the shape (6, 2), not (5, 2)."):
        decode_boxes(jnp.ones((2, 6, 32)), points, strides)
