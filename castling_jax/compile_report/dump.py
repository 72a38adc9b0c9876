"""Reads the TPU compiler's text: the scheduled HLO of a program, and the final schedules of kernels (its LLO dumps).

A bundle of a schedule is what the chip issues in one cycle. A bundle's depth is the number of loops around it; the
outermost loop is the grid of the Pallas kernel.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable

SHAPE = re.compile(r"\b(pred|[subf]\w*?\d+)\[([\d,]*)\]")
SCHEDULE_DUMP = "final_bundles"  # part of the name of a kernel's dump
UTILIZATION_DUMP = "final_hlo-static-per-bundle-utilization"
GRANULE_BYTES = 32  # the unit that a dump counts copies to and from HBM in
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What a schedule computes from the rows of a block, by the instruction.
OF_ROWS: dict[str, Callable[[int, int], int]] = {"smov": min, "sshrl": operator.rshift, "sand": operator.and_}
BRANCHES = ("true_computation", "false_computation", "branch_computations")


NO_CYCLES = 2**63 - 1  # the compiler writes this number where it gives up


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the scheduled HLO.

    Attributes:
      name: its name in the HLO, such as "%fusion.1".
      kind: the opcode, such as "fusion"; "" where the text shows none.
      label: the operation in the traced program that it comes from, such as "jit(f)/dot_general", or "".
      text: the whole instruction, in one line.
    """

    name: str
    kind: str
    label: str
    text: str

    @property
    def result(self) -> str:
        """The part of the text with the result's shape, or the shapes of a tuple."""
        return self.text.split(" = ")[1].split(f" {self.kind}(")[0]

    @property
    def operands(self) -> list[str]:
        """The names of the operands, and all names after them."""
        return re.findall(r"%[\w.\-]+", self.text.split(f" {self.kind}(", 1)[-1])

    @property
    def kernel_operands(self) -> str:
        """The part of the text with the shapes that a Pallas kernel takes."""
        return self.text.split("operand_layout_constraints=")[-1].split("}}")[0]

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match and int(match[1]) < NO_CYCLES else None

    def called(self, *attributes: str) -> list[str]:
        """The names of the computations under these attributes, such as "body", in the order of the text."""
        groups = re.findall(rf"(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


Computation = list[Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The scheduled HLO: computations by name, and the name of the computation that runs first."""

    computations: dict[str, Computation]
    entry: str


def read_program(hlo: str) -> Program:
    """Reads the text of a compiled program."""
    texts: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head:
            current = head[2]
            texts[current] = []
            entry = current if head[1] else entry
        elif line == "}":
            current = ""
        elif current and re.match(r"  (ROOT )?%", line):
            texts[current].append(line)
        elif current and texts[current]:
            texts[current][-1] += line  # attributes can hold line breaks
    return Program({name: [_read_instruction(text) for text in lines] for name, lines in texts.items()}, entry)


def _read_instruction(text: str) -> Instruction:
    name, value = text.strip().removeprefix("ROOT ").split(" = ", 1)
    kind = re.search(r"[}\])] ([a-z][\w\-]*)\(", value)
    label = re.search(r'op_name="([^"]*)"', value)
    return Instruction(name, kind[1] if kind else "", label[1] if label else "", text)


def shape_bytes(text: str) -> int:
    """Bytes of all arrays whose shapes are in a string, such as "(f32[8,128], s32[])"."""
    return sum(
        _element_bytes(kind) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in SHAPE.findall(text)
    )


def _element_bytes(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of COLLECTIVES.
      arrays: the arrays that a device gets, as pairs (dtype, dims).
      label: the operation in the traced program that it comes from.
      text: the instruction, which names the devices.
    """

    kind: str
    arrays: list[tuple[str, str]]
    label: str
    text: str

    @property
    def bytes(self) -> int:
        return shape_bytes(" ".join(f"{kind}[{dims}]" for kind, dims in self.arrays))


def collective(program: Program, instruction: Instruction) -> Collective | None:
    """The collective that an instruction is or starts; None for an instruction that only waits, and for all others.

    The compiler runs collectives beside the compute in two ways: as a pair of -start and -done, and inside the fusions
    that run at the same time. One collective is then written in its first fusion, in its last one and in all between.
    """
    kind = instruction.kind.removesuffix("-start")
    arrays = SHAPE.findall(instruction.result)
    if kind in COLLECTIVES:
        if instruction.kind in ("all-gather-start", "collective-permute-start"):
            # The tuple has the inputs, the outputs and numbers that identify the exchange.
            arrays = [array for array in arrays if array[1]]
            arrays = arrays[len(arrays) // 2 :]
        return Collective(kind, arrays, instruction.label, instruction.text)
    inner = collective_inside(program, instruction)
    if inner is None:
        return None
    # A reduce-scatter is written as an all-reduce of the whole arrays, from which the fusion takes each device's part.
    if "calls=%all-reduce-scatter" in instruction.text:
        return Collective("reduce-scatter", arrays, inner.label, inner.text)
    starts = instruction.kind == "async-start" or instruction.name.startswith("%async-collective-start")
    return Collective(inner.kind, SHAPE.findall(inner.result), inner.label, inner.text) if starts else None


def collective_inside(program: Program, instruction: Instruction) -> Instruction | None:
    """The collective that a fusion starts, waits for or runs beside; None where there is none."""
    inside = (i for name in instruction.called("calls") for i in program.computations.get(name, []))
    return next((i for i in inside if i.kind in COLLECTIVES), None)


def collectives(program: Program) -> list[Collective]:
    """All collectives of a program; a collective inside a loop counts once."""
    parts = {
        name
        for computation in program.computations.values()
        for instruction in computation
        if instruction.kind in ("fusion", "async-start")
        for name in instruction.called("calls")
    }
    run = (computation for name, computation in program.computations.items() if name not in parts)
    return [found for computation in run for i in computation if (found := collective(program, i))]


def trip_count(program: Program, loop: Instruction, around: Computation) -> int | None:
    """How often a loop runs that counts upwards by one between constants; None for other loops.

    A loop that may end earlier for another reason counts to its end.

    Args:
      program: the program, which has the loop's condition and body.
      loop: an instruction of the kind "while".
      around: the computation that the loop is in.
    """
    condition, body = (
        {i.name: i for i in program.computations[loop.called(part)[0]]} for part in ("condition", "body")
    )
    outside = {instruction.name: instruction for instruction in around}
    test = next((i for i in condition.values() if i.kind == "compare" and "direction=LT" in i.text), None)
    root = next((i for i in body.values() if i.text.lstrip().startswith("ROOT")), None)
    if test is None or root is None or root.kind != "tuple":
        return None
    counter = condition[test.operands[0]]
    place = re.search(r"index=(\d+)", counter.text)
    start = outside.get(loop.operands[0])
    if place is None or start is None or start.kind != "tuple":
        return None
    # The loop's state is one tuple outside, in the condition and in the body, and the counter has one place in it.
    step = body[root.operands[int(place[1])]]
    first = _constant(start.operands[int(place[1])], outside)
    stop = _constant(test.operands[1], condition)
    if first is None or stop is None or step.kind != "add" or 1 not in [_constant(x, body) for x in step.operands[:2]]:
        return None
    return max(stop - first, 0)


def _constant(name: str, instructions: dict[str, Instruction]) -> int | None:
    """The integer that an instruction gives, directly or as a copy of a constant; None for other instructions."""
    instruction = instructions.get(name)
    if instruction is None:
        return None
    if number := re.search(r" constant\((-?\d+)\)", instruction.text):
        return int(number[1])
    if instruction.kind in ("copy", "bitcast", "convert"):
        return _constant(instruction.operands[0], instructions)
    return None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final schedule of a kernel.

    Attributes:
      times: how often each bundle is issued; both sides of a predicated region count.
      copied_bytes: bytes that its copies move to and from HBM.
      unknown_loops: the number of loops whose trip count the schedule does not tell; they count once.
    """

    times: list[int]
    copied_bytes: int
    unknown_loops: int

    @property
    def cycles(self) -> int:
        return sum(self.times)


@dataclasses.dataclass(frozen=True)
class _Bundle:
    depth: int  # the number of loops around it
    opens_loop: bool
    trips: list[float]  # the trip counts in the exit tests of loops, or their means over the blocks of an array
    copied_bytes: int


def read_schedule(text: str) -> Schedule:
    """Reads a kernel's SCHEDULE_DUMP."""
    bundles = _read_bundles(text)
    times, unknown = [1.0] * len(bundles), 0
    opening = [i for i, bundle in enumerate(bundles) if bundle.opens_loop]
    for start in opening:
        inside = _loop_bundles(bundles, start, opening)
        trips = [n for i in inside if bundles[i].depth == bundles[start].depth for n in bundles[i].trips]
        unknown += len(trips) != 1
        for i in inside:
            times[i] *= max(trips, default=1)
    issued = [round(n) for n in times]
    copied = sum(bundle.copied_bytes * n for bundle, n in zip(bundles, issued, strict=True))
    return Schedule(issued, copied, unknown)


def _read_bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    registers = dict(re.findall(r"(%[sp]\w+) = (\w[^;}]*)", text))
    for line in text.splitlines():
        head = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(L[HBE]|P[BF]|CT)?\s*:\s*(>*)\s*\{", line)
        if not head:
            continue
        # An empty bundle does not show its depth, which is that of the bundle before.
        depth = len(head[2]) or (bundles[-1].depth if "{}" in line and bundles else 0)
        trips = re.findall(r"totalorder (?:\([^)]*\), )?%\w+, (\d+) /\* loop exit test", line)
        means = [_mean_trips(test, registers) for test in re.findall(r"sbr\.rel \(!(%p\w+)\)", line)]
        copies = re.findall(r"(?<!for )%\d+ = dma\.(?:hbm_to_\w+|\w+_to_hbm) [^;]*?/\*size_in_granules=\*/(\d+)", line)
        copied = GRANULE_BYTES * sum(map(int, copies))
        counts = [int(n) for n in trips] + [mean for mean in means if mean is not None]
        bundles.append(_Bundle(depth, head[1] == "LB", counts, copied))
    return bundles


def _mean_trips(test: str, registers: dict[str, str]) -> float | None:
    """The mean trip count of a loop over the rows of a block, until this predicate; None if it is another loop.

    The last block of an array may be cut. In the schedule the rows of block i are min(all - i * size, size), and a loop
    takes a whole part of them or a remainder.
    """
    stop = re.match(r"scmp\.ge\.s32\.totalorder %\w+, (%s\w+)", _definition(test, registers))
    counts = None if stop is None else _of_blocks(stop[1], registers)
    return None if counts is None else sum(counts) / len(counts)


def _definition(register: str, registers: dict[str, str]) -> str:
    """The instruction that gives a register, without the predicate of the instruction itself."""
    return re.sub(r"\(!?%p\w+\), ", "", registers.get(register, ""))


def _of_blocks(register: str, registers: dict[str, str]) -> list[int] | None:
    """The values of a register for all blocks of an array; None if it does not come from their rows."""
    text = _definition(register, registers)
    if left := re.match(r"ssub\.s32 ([1-9]\d*), (%s\w+)", text):
        start = _definition(left[2], registers)
        if size := re.match(r"smul\.u32 ([1-9]\d*), %s\w+", start):
            return list(range(int(left[1]), 0, -int(size[1])))
        if power := re.match(r"sshll\.u32 %s\w+, (\d+)", start):
            return list(range(int(left[1]), 0, -(2 ** int(power[1]))))
        return None
    step = (
        re.match(r"(smov) \(!(?P<below>%p\w+), (%s\w+)\), (\d+)", text)
        or re.match(r"(sshrl)\.u32(?P<below>) (%s\w+), (\d+)", text)
        or re.match(r"(sand)\.u32(?P<below>) (?=\d+, (%s\w+))(\d+)", text)
    )
    if step is None:
        return None
    function, below, argument, number = step.groups()
    # A minimum: the number, unless the register is below it.
    if below and _definition(below, registers).strip() != f"scmp.lt.s32.totalorder {argument}, {number}":
        return None
    values = _of_blocks(argument, registers)
    return None if values is None else [OF_ROWS[function](value, int(number)) for value in values]


def _loop_bundles(bundles: list[_Bundle], start: int, opening: list[int]) -> range:
    """The bundles of a loop: up to the last one that is as deep as the first, before a loop of no more depth opens."""
    depth = bundles[start].depth
    limit = next((i for i in opening if i > start and bundles[i].depth <= depth), len(bundles))
    return range(start, 1 + max(i for i in range(start, limit) if bundles[i].depth >= depth))


def read_utilization(text: str, times: list[int]) -> dict[str, float]:
    """Reads a kernel's UTILIZATION_DUMP, which has a line for each bundle.

    Args:
      text: the dump.
      times: how often each bundle is issued.

    Returns:
      unit -> share of its issue slots that are used, from 0 to 1. The units are MXU, XLU (permutes and reductions
      across lanes), VALU, VPOP, EUP (exponentials, reciprocals), VLOAD and VSTORE (VLOAD:FILL and VSTORE:SPILL are the
      part of them for lack of registers) and SALU. {} where the dump belongs to another schedule.
    """
    head, _, table = text.partition("== UTILIZATION:")
    names, capacities = head.strip().splitlines()[-2:]
    used = [[int(n) for n in line.split()] for line in table.strip().splitlines()]
    if len(used) != len(times):
        return {}
    totals = [sum(n * m for n, m in zip(column, times, strict=True)) for column in zip(*used, strict=True)]
    return {
        name.strip(): total / (int(capacity) * sum(times))
        for name, capacity, total in zip(names.split(","), capacities.split(), totals, strict=True)
    }
