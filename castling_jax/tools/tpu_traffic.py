"""What the pipelines of Pallas kernels move between HBM and the chip, from the kernels' block specifications."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from castling_jax.tools.tpu_dump import signature

HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "bool": "pred"}


def kernel_traffic(jaxpr: Any) -> dict[str, int | None]:
    """Bytes that each Pallas kernel's pipeline moves, by the `signature` of the kernel.

    Args:
      jaxpr: of a traced function.

    Returns:
      Every block that is fetched or written back as the grid moves on; where which block it is depends on data, one
      each step. None where a kernel copies by itself, or its grid is not constant.
    """
    # Index maps are evaluated, on the machine at hand.
    with jax.default_device(jax.devices("cpu")[0]):
        return {_signature(kernel): _pipeline_bytes(kernel.params["grid_mapping"]) for kernel in _kernels(jaxpr)}


def _kernels(jaxpr: Any) -> Iterator[Any]:
    """The calls of Pallas kernels in a jaxpr and in all that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = value if hasattr(value, "eqns") else getattr(value, "jaxpr", None)
                if hasattr(inner, "eqns"):
                    yield from _kernels(inner)


def _signature(kernel: Any) -> str:
    arrays = [variable.aval for variable in (*kernel.invars, *kernel.outvars)]
    return signature((_hlo_name(array.dtype), ",".join(map(str, array.shape))) for array in arrays)


def _hlo_name(dtype: Any) -> str:
    name = str(dtype)
    return HLO_NAMES.get(name) or re.sub(r"u?int", lambda match: match[0][0].replace("i", "s"), name)


def _pipeline_bytes(mapping: Any) -> int | None:
    if not all(isinstance(steps, int | np.integer) for steps in mapping.grid):
        return None
    total = 0
    for block in mapping.block_mappings:
        array = block.block_aval if hasattr(block, "block_aval") else block.transformed_block_aval
        space = str(array).split("{")[0]
        if "any" in space or "hbm" in space:
            return None
        if "smem" not in space:
            sizes = [getattr(size, "block_size", 1) or 1 for size in block.block_shape]
            size = int(np.prod(sizes)) * array.inner_aval.dtype.itemsize
            total += size * _fetches(block.index_map_jaxpr, [int(steps) for steps in mapping.grid])
    return total


def _fetches(index_map: Any, grid: list[int]) -> int:
    """How many times the block changes, with the first, as the grid is walked with its last axis fastest."""
    if not grid:
        return 1
    prefetched = index_map.jaxpr.invars[len(grid) :]  # scalars in fast memory that index maps may read
    used = {v for equation in index_map.jaxpr.eqns for v in equation.invars if not hasattr(v, "val")}
    if used & set(prefetched):
        return int(np.prod(grid))
    steps = [axis.reshape(-1) for axis in np.indices(grid, dtype=np.int32)]
    blocks = jax.vmap(
        lambda *step: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *step, *(0,) * len(prefetched))
    )(*steps)
    index = np.stack([np.broadcast_to(np.asarray(axis), steps[0].shape) for axis in blocks])
    return 1 + int((index[:, 1:] != index[:, :-1]).any(axis=0).sum())
