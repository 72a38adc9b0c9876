"""Where arrays live: batches are split over all devices, the state is on each of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from castling_jax.ops.errors import InputError


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split along their first axis, from this process's share of a batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises an InputError unless the mesh's devices divide the batch."""
    if batch_size % mesh.size:
        raise InputError(f"config.{name} = {batch_size} must be a multiple of the {mesh.size} devices.")
