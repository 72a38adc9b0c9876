import hashlib

import jax.numpy as jnp
import numpy as np

from castling_jax.training.state import parameters_sha256


def test_sha256_is_over_the_bytes_in_the_order_of_sorted_paths():
    params = {"norm1": {"scale": jnp.ones(2)}, "norm": {"bias": jnp.zeros(3), "a": jnp.full((1,), 2.0)}}
    expected = np.float32([2, 0, 0, 0, 1, 1]).tobytes()
    assert parameters_sha256(params) == hashlib.sha256(expected).hexdigest()


def test_one_bit_changes_it():
    first, second = np.float32([1, 2]), np.float32([1, 2])
    second.view(np.uint32)[0] ^= 1
    assert parameters_sha256({"a": first}) != parameters_sha256({"a": second})
