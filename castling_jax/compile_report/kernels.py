"""The cost of a traced program's Pallas kernels: their schedules, and the traffic of their pipelines.

Each kernel is compiled by itself for its dumps: writing the dumps of a whole program takes longer than compiling it.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from castling_jax.compile_report.dump import SCHEDULE_DUMP, UTILIZATION_DUMP, read_schedule, read_utilization

HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "bool": "pred"}
UNNAMED = "unnamed_kernel"


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """A compiled Pallas kernel.

    Attributes:
      cycles: bundles of its schedule, loops times their trips.
      copied_bytes: bytes that its copies move to and from HBM, by the schedule.
      pipeline_bytes: bytes that its pipeline moves, from `pipeline_bytes`.
      unknown_loops: the number of loops whose trip count the schedule does not tell; they count once.
      utilization: unit -> share of its issue slots that are used, from `read_utilization`.
    """

    cycles: int
    copied_bytes: int
    pipeline_bytes: int | None
    unknown_loops: int
    utilization: dict[str, float]


def kernel_key(name: str | None, shapes: Iterable[tuple[str, str]]) -> str:
    """What a kernel has in common in the traced program and in the HLO: its name, and its arrays.

    Args:
      name: its name in either; None for a kernel without one.
      shapes: the shapes of its arguments and results, pairs such as ("f32", "8,128").
    """
    # The HLO numbers kernels of the same name.
    plain = UNNAMED if name is None else re.sub(r"\W+", "_", name.lstrip("%").split(".")[0])
    return " ".join([plain, *sorted(f"{kind}[{dims}]" for kind, dims in shapes)])


def find_kernels(jaxpr: Any) -> dict[str, Any]:
    """The Pallas kernels in a jaxpr and in the jaxprs that it calls, each once, by `kernel_key`."""
    return {_key(call): call for call in _calls(jaxpr) if not call.params["interpret"]}


def compile_kernels(kernels: dict[str, Any], device: Any, dump: Path) -> dict[str, KernelSchedule]:
    """Compiles each kernel by itself.

    Args:
      kernels: kernels from `find_kernels`.
      device: the device to compile for.
      dump: the folder of the compiler's dumps, which its environment names.

    Returns:
      The kernels' schedules by the same keys, without kernels whose schedule was not dumped.
    """
    schedules = {}
    for key, call in kernels.items():
        before = set(dump.glob("*.txt"))
        _compile(call, device, key.split()[0])
        pattern = re.compile(rf"\d+-{key.split()[0]}(\.\d+)*-\d+-({SCHEDULE_DUMP}|{UTILIZATION_DUMP})\.txt")
        matches = ((pattern.fullmatch(path.name), path) for path in sorted(set(dump.glob("*.txt")) - before))
        texts = {match[2]: path.read_text() for match, path in matches if match}
        if SCHEDULE_DUMP in texts:
            schedule = read_schedule(texts[SCHEDULE_DUMP])
            schedules[key] = KernelSchedule(
                cycles=schedule.cycles,
                copied_bytes=schedule.copied_bytes,
                pipeline_bytes=pipeline_bytes(call),
                unknown_loops=schedule.unknown_loops,
                utilization=read_utilization(texts.get(UTILIZATION_DUMP, ""), schedule.times),
            )
    return schedules


def _compile(call: Any, device: Any, name: str) -> None:
    # A kernel of a sharded program has outputs on a mesh; by itself it has no mesh.
    outputs = tuple(jax.core.ShapedArray(out.shape, out.dtype) for out in call.params["out_avals"])
    sharding = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in call.invars]

    def kernel(*arrays: jax.Array) -> Any:
        return call.primitive.bind(*arrays, **call.params | {"out_avals": outputs})

    kernel.__name__ = name  # names the dumps
    jax.jit(kernel).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def _calls(jaxpr: Any) -> Iterator[Any]:
    """The calls of Pallas kernels in a jaxpr and in the jaxprs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = value if hasattr(value, "eqns") else getattr(value, "jaxpr", None)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner)


def _key(call: Any) -> str:
    arrays = [variable.aval for variable in (*call.invars, *call.outvars)]
    shapes = ((_hlo_name(array.dtype), ",".join(map(str, array.shape))) for array in arrays)
    return kernel_key(call.params["name"], shapes)


def _hlo_name(dtype: Any) -> str:
    name = str(dtype)
    return HLO_NAMES.get(name) or re.sub(r"u?int", lambda match: match[0][0].replace("i", "s"), name)


def pipeline_bytes(call: Any) -> int | None:
    """Bytes that the pipeline of a Pallas kernel moves, by its block specifications.

    Each block counts that is fetched or written back as the grid moves on. Where data decides which block it is, each
    step counts one. None where the kernel copies by itself, or its grid is not constant.
    """
    mapping = call.params["grid_mapping"]
    if not all(isinstance(steps, int | np.integer) for steps in mapping.grid):
        return None
    total = 0
    for block in mapping.block_mappings:
        array = block.block_aval if hasattr(block, "block_aval") else block.transformed_block_aval
        space = str(array).split("{")[0]
        if "any" in space or "hbm" in space:  # the kernel copies this array by itself
            return None
        if "smem" not in space:
            sizes = [getattr(size, "block_size", 1) or 1 for size in block.block_shape]
            size = int(np.prod(sizes)) * array.inner_aval.dtype.itemsize
            total += size * _fetches(block.index_map_jaxpr, [int(steps) for steps in mapping.grid])
    return total


def _fetches(index_map: Any, grid: list[int]) -> int:
    """How often a block is fetched: the first time, and at each change as the grid's last axis runs fastest."""
    if not grid:
        return 1
    prefetched = index_map.jaxpr.invars[len(grid) :]  # scalars in fast memory, which index maps may read
    used = {v for equation in index_map.jaxpr.eqns for v in equation.invars if not hasattr(v, "val")}
    if used & set(prefetched):
        return int(np.prod(grid))
    steps = [axis.reshape(-1) for axis in np.indices(grid, dtype=np.int32)]
    with jax.default_device(jax.devices("cpu")[0]):  # index maps are evaluated on this machine, with no TPU
        blocks = jax.vmap(
            lambda *step: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *step, *(0,) * len(prefetched))
        )(*steps)
    index = np.stack([np.broadcast_to(np.asarray(axis), steps[0].shape) for axis in blocks])
    return 1 + int((index[:, 1:] != index[:, :-1]).any(axis=0).sum())
