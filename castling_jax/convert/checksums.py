"""Checksums of arrays, computed on the devices that hold the shards, before writing and after reading."""

from typing import Any

import jax
import jax.numpy as jnp


def verify_checksums(tree: Any, expected: dict[str, int]) -> None:
    """Raises a ValueError unless a tree, which may be a part of the saved one, has the `expected` checksums."""
    for path, checksum in checksums(tree).items():
        if expected.get(path) != checksum:
            raise ValueError(f"the checksum of {path} is not the one it was saved with")


def checksums(tree: Any) -> dict[str, int]:
    """The path and a 32-bit checksum of each leaf of a pytree.

    The checksum is the sum, modulo 2^32, of each element's bits times an odd number that depends on its place. A single
    flipped bit always changes it, and swapped elements change it with probability 1 - 2^-32. It is a sum so that
    each device can add up its own shards.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
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
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # 2^32 over the golden ratio: the factors of neighbouring places differ in many bits.
    place = (place ^ (place >> 16)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
