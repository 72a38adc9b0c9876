"""Checksums of arrays, computed where the arrays are: on the devices that hold the shards, or in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FACTOR = 0x9E3779B1  # 2^32 over the golden ratio: the factors of neighbouring places differ in many bits
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # bytes of an element -> the dtype of its bits


def verify_checksums(tree: Any, expected: dict[str, int]) -> None:
    """Raises a ValueError unless a tree, which may be a part of the saved one, has the `expected` checksums."""
    for path, checksum in checksums(tree).items():
        if expected.get(path) != checksum:
            raise ValueError(f"the checksum of {path} is not the one it was saved with")


def checksums(tree: Any) -> dict[str, int]:
    """The path and a 32-bit checksum of each leaf of a pytree of arrays.

    If arrays are spread over processes, all of these make the call together, and have the same result.

    The checksum is the sum, modulo 2^32, of each element's bits times an odd number that depends on its place. A single
    flipped bit always changes it, and swapped elements change it with probability 1 - 2^-32. It is a sum so that
    each device can add up its own shards.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = jax.device_get([_parts(leaf) for _, leaf in leaves])
    sums = np.array([sum(int(part.sum()) for part in of_one) % 2**32 for of_one in parts])
    is_spread = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for _, leaf in leaves]
    if any(is_spread):
        of_all = multihost_utils.process_allgather(sums.astype(np.uint32)).sum(axis=0, dtype=np.uint32)
        sums = np.where(is_spread, of_all, sums)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return dict(zip(names, sums.tolist(), strict=True))


def _parts(leaf: Any) -> list[Any]:
    """The sums of this process's shards, where these are; of a shard's copies, in whatever process, one counts."""
    if not isinstance(leaf, jax.Array):
        return [_checksum_on_host(leaf)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf.sharding, NamedSharding):
        return [_checksum(leaf, leaf.shape, leaf.ndim * [0])]
    counted = {shard.device for shard in leaf.addressable_shards if shard.replica_id == 0}
    sums = _checksum_shards(leaf, leaf.sharding.mesh, leaf.sharding.spec)
    return [part.data for part in sums.addressable_shards if part.device in counted]


# A program for each shape, of which a model has few: one for all leaves takes several times as long to compile. Each
# device keeps its sum: hundreds of programs run at once, and if they added up over the devices, each device could come
# to them in another order and wait without end.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _checksum_shards(leaf: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Each device's part of the sum, [devices]."""
    axes = [*spec, *(leaf.ndim - len(spec)) * [None]]

    def of_shard(shard: jax.Array) -> jax.Array:
        start = [
            0 if names is None else jax.lax.axis_index(names) * size
            for names, size in zip(axes, shard.shape, strict=True)
        ]
        return _checksum(shard, leaf.shape, start)[None]

    over_all = PartitionSpec(mesh.axis_names)
    return jax.shard_map(of_shard, mesh=mesh, in_specs=spec, out_specs=over_all, check_vma=False)(leaf)


@functools.partial(jax.jit, static_argnums=1)
def _checksum(shard: jax.Array, shape: tuple[int, ...], start: list[Any]) -> jax.Array:
    """The part of a shard whose first element has the indices `start` in an array of this shape."""
    if shard.dtype == jnp.bool_:
        shard = shard.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(shard, UNSIGNED[shard.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + jnp.uint32(start[axis])
        place = place * jnp.uint32(size) + along
    place = (place ^ (place >> 16)) * jnp.uint32(FACTOR)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _checksum_on_host(array: np.ndarray) -> np.uint32:
    """The same number in NumPy, whose integers wrap around as well."""
    array = np.ascontiguousarray(array, jax.dtypes.canonicalize_dtype(array.dtype))  # 64 bits: as JAX would hold them
    bits = array.reshape(-1).view(UNSIGNED[array.dtype.itemsize]).astype(np.uint32)
    place = np.arange(bits.size, dtype=np.uint32)
    place = (place ^ (place >> np.uint32(16))) * np.uint32(FACTOR)
    return np.sum(bits * (2 * place + 1), dtype=np.uint32)
