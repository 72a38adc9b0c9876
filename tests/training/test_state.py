import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from castling_jax.training.sharding import state_shardings
from castling_jax.training.state import create_state, parameter_table, parameters_sha256


def test_sha256_is_over_the_bytes_in_the_order_of_sorted_paths():
    params = {"norm1": {"scale": jnp.ones(2)}, "norm": {"bias": jnp.zeros(3), "a": jnp.full((1,), 2.0)}}
    expected = np.float32([2, 0, 0, 0, 1, 1]).tobytes()
    assert parameters_sha256(params) == hashlib.sha256(expected).hexdigest()


def test_one_bit_changes_it():
    first, second = np.float32([1, 2]), np.float32([1, 2])
    second.view(np.uint32)[0] ^= 1
    assert parameters_sha256({"a": first}) != parameters_sha256({"a": second})


def test_statistics_are_part_of_the_tree_only_where_there_are_any():
    # So that a checkpoint of a model without batch norm is what it was before there was any.
    def paths(state):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    params, optimizer = {"a": jnp.ones(2)}, optax.sgd(0.1)
    without = create_state({"params": params}, optimizer, seed=0)
    assert paths(without) == [".params['a']", ".step", ".key"]
    assert jax.tree.map(lambda leaf: leaf, without).batch_stats == {}
    statistics = {"bn": {"mean": jnp.zeros(2)}}
    state = create_state({"params": params, "batch_stats": statistics}, optimizer, seed=0)
    assert paths(state) == [".params['a']", ".batch_stats['bn']['mean']", ".step", ".key"]
    assert jax.tree.map(lambda leaf: leaf, state).batch_stats.keys() == statistics.keys()
    assert state.variables.keys() == {"params", "batch_stats"}


def test_parameter_table_says_what_is_where():
    params = {"mlp": {"fc1": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}, "norm": {"scale": jnp.ones(4)}}
    state = create_state({"params": params}, optax.sgd(0.1), seed=0)
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 1), ("replica", "data", "fsdp", "tensor"))
    lines = parameter_table(state, state_shardings(state, mesh)).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["mesh:", "replica 1, data 2, fsdp 4, tensor 1"],
        ["mlp/fc1/bias", "(8,)    float32  8   tensor"],
        ["mlp/fc1/kernel", "(4, 8)  float32  32  fsdp, tensor"],
        ["norm/scale", "(4,)    float32  4   on every device"],
        ["all", "44"],
    ]
