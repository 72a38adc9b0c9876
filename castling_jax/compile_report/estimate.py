"""The TPU compiler's own estimate of a program, added up.

The compiler gives the cycles of each operation in the scheduled program. A Pallas kernel takes the bundles of its final
schedule or its traffic with HBM, whichever is longer. A loop counts times its trip count, and a conditional by its
longest branch. An operation that only moves data and has no estimate takes its traffic with HBM. What the program's
text does not tell is listed as incomplete.
"""

import collections
import dataclasses
import re

from castling_jax.compile_report.chips import Chip
from castling_jax.compile_report.dump import (
    BRANCHES,
    COLLECTIVES,
    SHAPE,
    Collective,
    Instruction,
    Program,
    collective,
    collective_inside,
    shape_bytes,
    trip_count,
)
from castling_jax.compile_report.kernels import KernelSchedule, kernel_key

# Operations that take no time where the compiler gives no cycles: they move nothing, or run beside the others.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "domain", "opt-barrier"),
    *("partition-id", "replica-id", "after-all", "while", "conditional", "call"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-update", "async-done"),
    *COLLECTIVES,
    *("all-reduce-start", "all-reduce-done", "all-gather-start", "all-gather-done"),
    *("collective-permute-start", "collective-permute-done"),
}
# Operations that only move data: they run at HBM's bandwidth where the compiler gives no cycles.
MOVES = {"copy", "concatenate", "slice", "pad", "reverse", "transpose", "broadcast"}
NO_ESTIMATE = "no estimate"
REGISTER_BYTES = 8 * 128 * 4  # work on one register takes a few cycles, which count for nothing
FREE_CUSTOM_CALLS = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of a Pallas kernel.

    Attributes:
      cycles: bundles of its schedule, loops times their trips.
      compute_ms: milliseconds of these cycles.
      traffic_ms: milliseconds of its traffic with HBM, at the chip's bandwidth.
      utilization: unit -> share of its issue slots that are used, from `read_utilization`.
    """

    cycles: int
    compute_ms: float
    traffic_ms: float
    utilization: dict[str, float]

    @property
    def milliseconds(self) -> float:
        return max(self.compute_ms, self.traffic_ms)

    @property
    def bound(self) -> str:
        """What limits it: "HBM", or the unit with the largest share of used slots; "?" where the shares are unknown."""
        if self.traffic_ms > self.compute_ms:
            return "HBM"
        return max(self.utilization, key=lambda unit: self.utilization[unit], default="?")


@dataclasses.dataclass(frozen=True)
class Row:
    """An operation and the milliseconds of all its runs; `label` is its place in the traced program."""

    milliseconds: float
    name: str
    label: str
    kernel: Kernel | None = None


@dataclasses.dataclass
class Cost:
    """The cost of a computation.

    Attributes:
      rows: its operations.
      sent: its collectives, each with the number of its runs.
      prefetched_bytes: bytes of asynchronous copies.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    sent: list[tuple[int, Collective]] = dataclasses.field(default_factory=list)
    prefetched_bytes: int = 0

    def add(self, other: "Cost") -> None:
        self.rows += other.rows
        self.sent += other.sent
        self.prefetched_bytes += other.prefetched_bytes

    @property
    def collectives(self) -> dict[str, int]:
        """kind -> bytes of the results."""
        total: collections.Counter[str] = collections.Counter()
        for times, sent in self.sent:
            total[sent.kind] += times * sent.bytes
        return dict(total)

    @property
    def milliseconds(self) -> float:
        return sum(row.milliseconds for row in self.rows)


class Estimator:
    """Adds up a compiled program; `incomplete` then has a sentence for each thing that could not be counted.

    Args:
      program: the scheduled HLO.
      kernels: its Pallas kernels by their `kernel_key`.
      chip: the chip that it runs on.
    """

    def __init__(self, program: Program, kernels: dict[str, KernelSchedule], chip: Chip):
        self.program = program
        self.kernels = kernels
        self.chip = chip
        self.incomplete: set[str] = set()

    def computation(self, name: str, times: int) -> Cost:
        """The cost of a computation that runs `times` times."""
        cost = Cost()
        around = self.program.computations.get(name, [])
        for instruction in around:
            if instruction.kind == "while":
                trips = trip_count(self.program, instruction, around)
                # A loop over a few numbers, as random bits need, takes no time worth a warning.
                if trips is None and not self._is_small(instruction):
                    name, label = _unnumbered(instruction.name), instruction.label
                    self.incomplete.add(f"loop {name} ({label}): trip count is not a constant, counted once")
                cost.add(self.computation(instruction.called("body")[0], times * (1 if trips is None else trips)))
            elif instruction.kind == "conditional":
                branches = [self.computation(name, times) for name in instruction.called(*BRANCHES)]
                cost.add(max(branches, key=lambda branch: branch.milliseconds))
            elif instruction.kind == "call":
                cost.add(self.computation(instruction.called("to_apply")[0], times))
            elif "tpu_custom_call" in instruction.text:
                kernel = self._kernel(instruction)
                cost.rows.append(Row(times * kernel.milliseconds, instruction.name, instruction.label, kernel))
            else:
                cost.add(self._operation(instruction, times))
        return cost

    def _operation(self, instruction: Instruction, times: int) -> Cost:
        cost = Cost()
        kind, name, text = instruction.kind, instruction.name, instruction.text
        if sent := collective(self.program, instruction):
            cost.sent.append((times, sent))
        # The links' time is counted elsewhere: a fusion that only waits for a collective takes none here.
        waits = collective_inside(self.program, instruction) is not None
        if kind == "copy-start" and (copied := SHAPE.search(instruction.result)):
            cost.prefetched_bytes += times * shape_bytes(copied[0])
        if instruction.cycles is not None and kind.removesuffix("-start") not in COLLECTIVES:
            milliseconds = times * instruction.cycles / self.chip.gigahertz / 1e6
            cost.rows.append(Row(milliseconds, name, instruction.label))
        elif kind in ("send", "recv") or "is_host_transfer=true" in text or "host_compute" in text:
            self.incomplete.add(f"{kind} {name}: talks to the host")
        elif not kind or kind in FREE or FREE_CUSTOM_CALLS.search(text) or waits or self._is_small(instruction):
            pass
        elif kind in MOVES:
            moved = 2 * times * shape_bytes(instruction.result)  # read and written
            cost.rows.append(Row(moved / self.chip.hbm_gigabytes_per_second / 1e6, name, instruction.label))
        else:
            self.incomplete.add(f"{kind} {_unnumbered(name)} ({instruction.label}): {NO_ESTIMATE}")
        if "execution_thread=" in text and 'execution_thread="main"' not in text:
            self.incomplete.add(f"{kind} {name}: runs elsewhere than on the chip")
        return cost

    @staticmethod
    def _is_small(instruction: Instruction) -> bool:
        return shape_bytes(instruction.result) <= REGISTER_BYTES

    def _kernel(self, instruction: Instruction) -> Kernel:
        name, result, operands = instruction.name, instruction.result, instruction.kernel_operands
        shapes = SHAPE.findall(f"{result} {operands}")
        # The HLO makes up a name for a kernel that has none in the traced program.
        keys = [kernel_key(known, shapes) for known in (name, None)]
        schedule = next((self.kernels[key] for key in keys if key in self.kernels), None)
        if schedule is None:
            self.incomplete.add(f"kernel {_unnumbered(name)}: no schedule dumped, HBM traffic only")
            schedule = KernelSchedule(0, copied_bytes=0, pipeline_bytes=None, unknown_loops=0, utilization={})
        if schedule.unknown_loops:
            loops = f"{schedule.unknown_loops} loops whose trip count is not a constant, counted once"
            self.incomplete.add(f"kernel {_unnumbered(name)}: {loops}")
        moved = schedule.pipeline_bytes
        if moved is None:
            moved = max(shape_bytes(result) + shape_bytes(operands), schedule.copied_bytes)
        return Kernel(
            cycles=schedule.cycles,
            compute_ms=schedule.cycles / self.chip.gigahertz / 1e6,
            traffic_ms=moved / self.chip.hbm_gigabytes_per_second / 1e6,
            utilization=schedule.utilization,
        )


def _unnumbered(name: str) -> str:
    """An operation's name without its number, so that a sentence about it is the same for all layers."""
    return name.split(".")[0]
