"""What the Pallas kernels of a traced program cost: their schedules, and what their pipelines move.

The schedule is taken from the compiler's dumps of each kernel compiled on its own: to write the dumps of a whole
program takes longer than to compile it.
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
    """A Pallas kernel, as it is compiled.

    Attributes:
      cycles: bundles of its schedule, loops times their trips.
      copied_bytes: what its copies move to and from HBM, by the schedule.
      pipeline_bytes: what its pipeline moves, by its block specifications; None where they do not tell.
      unknown_loops: how many loops, counted once, have a trip count that is not a constant.
      utilization: share of its issue slots that each unit uses, as `read_utilization` has it.
    """

    cycles: int
    copied_bytes: int
    pipeline_bytes: int | None
    unknown_loops: int
    utilization: dict[str, float]


def kernel_key(name: str | None, shapes: Iterable[tuple[str, str]]) -> str:
    """What a kernel in the traced program and the same one in the HLO have in common: its name, and its arrays.

    Args:
      name: as either has it, None of a kernel that has none; the HLO tells kernels of one name apart by numbers.
      shapes: of what it takes and gives, pairs such as ("f32", "8,128").
    """
    plain = UNNAMED if name is None else re.sub(r"\W+", "_", name.lstrip("%").split(".")[0])
    return " ".join([plain, *sorted(f"{kind}[{dims}]" for kind, dims in shapes)])


def find_kernels(jaxpr: Any) -> dict[str, Any]:
    """The calls of Pallas kernels in a jaxpr and in all that it calls, each once, by its `kernel_key`."""
    return {_key(call): call for call in _calls(jaxpr) if not call.params["interpret"]}


def compile_kernels(kernels: dict[str, Any], device: Any, dump: Path) -> dict[str, KernelSchedule]:
    """Compiles kernels, each on its own.

    Args:
      kernels: from `find_kernels`.
      device: that they are compiled for.
      dump: where the compiler leaves its dumps, as its environment says.

    Returns:
      What there is to know of each; one of which no schedule was dumped is left out.
    """
    schedules = {}
    for key, call in kernels.items():
        before = set(dump.glob("*.txt"))
        _compile(call, device, key.split()[0])
        pattern = re.compile(rf"\d+-{key.split()[0]}(\.\d+)*-\d+-({SCHEDULE_DUMP}|{UTILIZATION_DUMP})\.txt")
        found = ((pattern.fullmatch(path.name), path) for path in sorted(set(dump.glob("*.txt")) - before))
        texts = {match[2]: path.read_text() for match, path in found if match}
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
    # On a mesh, what comes out says where it lies; there is none where the kernel is on its own.
    outputs = tuple(jax.core.ShapedArray(out.shape, out.dtype) for out in call.params["out_avals"])
    sharding = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in call.invars]

    def kernel(*arrays: jax.Array) -> Any:
        return call.primitive.bind(*arrays, **call.params | {"out_avals": outputs})

    kernel.__name__ = name  # by which it is dumped
    jax.jit(kernel).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def _calls(jaxpr: Any) -> Iterator[Any]:
    """The calls of Pallas kernels in a jaxpr and in all that it calls."""
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

    Every block counts that is fetched or written back as the grid moves on; where which block it is depends on data,
    one each step. None where a kernel copies by itself, or its grid is not constant.
    """
    mapping = call.params["grid_mapping"]
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
    with jax.default_device(jax.devices("cpu")[0]):  # the index maps are evaluated, on the machine at hand
        blocks = jax.vmap(
            lambda *step: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *step, *(0,) * len(prefetched))
        )(*steps)
    index = np.stack([np.broadcast_to(np.asarray(axis), steps[0].shape) for axis in blocks])
    return 1 + int((index[:, 1:] != index[:, :-1]).any(axis=0).sum())
