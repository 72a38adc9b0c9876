"""Checksums of arrays, computed where the arrays are: on the devices that hold the shards, or in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FACTOR = 0x9E3779B1  # 2^32 over the golden ratio: the factors of neighbouring places differ in many bits
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # bytes of an element -> the dtype of its bits


def verify_checksums(tree: Any, expected: dict[str, int]) -> None:
    """Raises a ValueError unless a tree, which may be a part of the saved one, has the `expected` checksums."""
    for path, checksum in checksums(tree).items():
        if expected.get(path) != checksum:
            raise ValueError(f"the checksum of {path} is not the one it was saved with")


def checksums(tree: Any) -> dict[str, int]:
    """The path and a 32-bit checksum of each leaf of a pytree: all jax.Arrays, or all NumPy arrays.

    The checksum is the sum, modulo 2^32, of each element's bits times an odd number that depends on its place. A single
    flipped bit always changes it, and swapped elements change it with probability 1 - 2^-32. It is a sum so that
    each device can add up its own shards.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    # A checkpoint of NumPy arrays is checked before every start: a program for its shapes takes seconds to compile.
    on_host = all(isinstance(array, np.ndarray) and array.dtype.itemsize in UNSIGNED for array in arrays)
    sums = map(_checksum_on_host, arrays) if on_host else jax.device_get(_checksums(arrays))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(total) for name, total in zip(names, sums, strict=True)}


# One program for all leaves. Hundreds of small ones run at once on CPUs, and their sums over the devices then wait for
# each other without end, because each device may come to them in another order.
@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = (place ^ (place >> 16)) * jnp.uint32(FACTOR)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _checksum_on_host(array: np.ndarray) -> int:
    """The same number in NumPy, whose integers wrap around as well."""
    bits = np.ascontiguousarray(array).reshape(-1).view(UNSIGNED[array.dtype.itemsize]).astype(np.uint32)
    place = np.arange(bits.size, dtype=np.uint32)
    place = (place ^ (place >> np.uint32(16))) * np.uint32(FACTOR)
    return int(np.sum(bits * (2 * place + 1), dtype=np.uint32))
