import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from castling_jax.models.position import resize_position_embedding, resize_relative_positions


def resize_with_pillow(embedding, old_grid, new_grid, prefix_tokens):
    """Channel by channel as a float image: Pillow's BICUBIC is antialiased, with the same filter (a = -1/2)."""
    embedding = np.asarray(embedding, np.float32)
    patches = embedding[0, prefix_tokens:].reshape(*old_grid, -1)
    height, width = new_grid
    resized = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channel)).resize((width, height), Image.Resampling.BICUBIC))
        for channel in np.moveaxis(patches, -1, 0)
    ]
    grid = np.stack(resized, axis=-1).reshape(1, height * width, -1)
    return jnp.asarray(np.concatenate([embedding[:, :prefix_tokens], grid], axis=1))


def resize_with_interp(table, length):
    """The table as samples, at the middles of its cells, of one function that is level beyond its ends."""
    old = len(table)
    at = (np.arange(length) + 0.5) * old / length - 0.5
    return np.stack([np.interp(at, np.arange(old), column) for column in np.asarray(table, np.float64).T], axis=1)


def draw(prefix_tokens, grid, channels=3):
    size = (1, prefix_tokens + grid[0] * grid[1], channels)
    return jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)


@pytest.mark.parametrize("prefix_tokens", [0, 2])
@pytest.mark.parametrize(
    ("old_grid", "new_grid"),
    [((4, 4), (7, 7)), ((14, 14), (9, 9)), ((4, 4), (2, 2)), ((6, 6), (3, 11)), ((3, 5), (6, 5)), ((4, 4), (1, 1))],
)
def test_resizes_as_pillow_does_and_keeps_the_prefix(old_grid, new_grid, prefix_tokens):
    embedding = draw(prefix_tokens, old_grid)
    resized = resize_position_embedding(embedding, old_grid, new_grid, prefix_tokens)
    chex.assert_trees_all_equal(resized[:, :prefix_tokens], embedding[:, :prefix_tokens])
    # Two float32 sums of up to some 20 terms of order one.
    expected = resize_with_pillow(embedding, old_grid, new_grid, prefix_tokens)
    chex.assert_trees_all_close(resized, expected, rtol=0, atol=4e-6)


def test_the_same_grid_leaves_it_alone():
    embedding = draw(1, (4, 4))
    assert resize_position_embedding(embedding, (4, 4), (4, 4), 1) is embedding


def test_bfloat16_is_resized_in_float32():
    embedding = draw(1, (4, 4)).astype(jnp.bfloat16)
    resized = resize_position_embedding(embedding, (4, 4), (7, 7), 1)
    chex.assert_type(resized, jnp.bfloat16)
    wide = resize_position_embedding(embedding.astype(jnp.float32), (4, 4), (7, 7), 1)
    chex.assert_trees_all_equal(resized, wide.astype(jnp.bfloat16))


def test_its_gradient_is_finite():
    gradient = jax.grad(lambda e: jnp.sum(jnp.square(resize_position_embedding(e, (4, 4), (7, 7), 1))))(draw(1, (4, 4)))
    chex.assert_tree_all_finite(gradient)


def test_another_number_of_tokens_is_refused(refuses):
    with refuses("17 tokens", "2 prefix tokens", "4 x 4"):
        resize_position_embedding(draw(1, (4, 4)), (4, 4), (7, 7), 2)


@pytest.mark.parametrize("length", [27, 9, 5, 1])
def test_relative_positions_are_interpolated_without_antialiasing(length):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(13, 4)), jnp.float32)
    resized = resize_relative_positions(table, length)
    # Positions of up to 13 are known to float32's rounding, 1e-6 of a step.
    np.testing.assert_allclose(resized, resize_with_interp(table, length), rtol=0, atol=4e-6)


def test_relative_positions_of_the_same_length_are_left_alone_and_bfloat16_stays():
    table = jnp.ones((13, 4), jnp.bfloat16)
    assert resize_relative_positions(table, 13) is table
    chex.assert_type(resize_relative_positions(table, 5), jnp.bfloat16)
