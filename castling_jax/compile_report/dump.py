"""What the TPU compiler writes of a program: the scheduled HLO, and the final schedules of kernels (its LLO dumps).

In a schedule a bundle is what the chip issues in one cycle. Loops are shown in their bundles' depth: the grid of a
Pallas kernel is the outermost one.
"""

import dataclasses
import math
import re

SHAPE = re.compile(r"\b(pred|[subf]\w*?\d+)\[([\d,]*)\]")
SCHEDULE_DUMP = "final_bundles"  # how the dumps of a kernel are called
UTILIZATION_DUMP = "final_hlo-static-per-bundle-utilization"
GRANULE_BYTES = 32  # what copies to and from HBM are counted in
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BRANCHES = ("true_computation", "false_computation", "branch_computations")


NO_CYCLES = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the scheduled HLO.

    Attributes:
      name: as it stands there, such as "%fusion.1".
      kind: the opcode, such as "fusion"; "" where there is none to be seen.
      label: the operation in the program that it comes from, such as "jit(f)/dot_general", or "".
      text: all of it, in one line.
    """

    name: str
    kind: str
    label: str
    text: str

    @property
    def result(self) -> str:
        """The part that says the result's shape, or the shapes of a tuple."""
        return self.text.split(" = ")[1].split(f" {self.kind}(")[0]

    @property
    def operands(self) -> list[str]:
        """Names of the operands, and of whatever else is named behind them."""
        return re.findall(r"%[\w.\-]+", self.text.split(f" {self.kind}(", 1)[-1])

    @property
    def kernel_operands(self) -> str:
        """The part that says the shapes a Pallas kernel takes."""
        return self.text.split("operand_layout_constraints=")[-1].split("}}")[0]

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it has none, and where it gives up, with the largest number there is."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found and int(found[1]) < NO_CYCLES else None

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that are called as one of these, such as "body", in the order they stand in."""
        found = re.findall(rf"(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
        return [name for group in found for name in re.findall(r"[\w.\-]+", group)]


Computation = list[Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The scheduled HLO: computations by name, and the name of the one that is run."""

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
    """Bytes of all arrays whose shapes stand in a text, such as "(f32[8,128], s32[])"."""
    return sum(
        _element_bytes(kind) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in SHAPE.findall(text)
    )


def _element_bytes(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices exchange.

    Attributes:
      kind: one of COLLECTIVES.
      arrays: that a device gets, pairs (dtype, dims).
      label: the operation in the program that it comes from.
      text: the instruction, which says between which devices.
    """

    kind: str
    arrays: list[tuple[str, str]]
    label: str
    text: str

    @property
    def bytes(self) -> int:
        return shape_bytes(" ".join(f"{kind}[{dims}]" for kind, dims in self.arrays))


def collective(program: Program, instruction: Instruction) -> Collective | None:
    """The collective that an instruction is, or starts; None of any other, and of what waits for one.

    The compiler runs collectives beside the compute in two ways: as a pair of -start and -done, and inside the fusions
    they run beside, where one collective stands in its first fusion, in its last one and in all between.
    """
    kind = instruction.kind.removesuffix("-start")
    arrays = SHAPE.findall(instruction.result)
    if kind in COLLECTIVES:
        if instruction.kind in ("all-gather-start", "collective-permute-start"):
            # (what goes in, what comes out, numbers that it is known by)
            arrays = [array for array in arrays if array[1]]
            arrays = arrays[len(arrays) // 2 :]
        return Collective(kind, arrays, instruction.label, instruction.text)
    found = collective_inside(program, instruction)
    if found is None:
        return None
    if "calls=%all-reduce-scatter" in instruction.text:
        return Collective("reduce-scatter", arrays, found.label, found.text)
    starts = instruction.kind == "async-start" or instruction.name.startswith("%async-collective-start")
    return Collective(found.kind, SHAPE.findall(found.result), found.label, found.text) if starts else None


def collective_inside(program: Program, instruction: Instruction) -> Instruction | None:
    """The collective that a fusion starts, waits for or runs beside; None where there is none."""
    inside = (i for name in instruction.called("calls") for i in program.computations.get(name, []))
    return next((i for i in inside if i.kind in COLLECTIVES), None)


def collectives(program: Program) -> list[Collective]:
    """All collectives of a program, those of a loop once."""
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
    """How often a loop runs that counts upwards by one between constants; None where it is another.

    A loop that can end earlier for another reason is taken to run to the end of its count.

    Args:
      program: where the loop's condition and body are.
      loop: an instruction of the kind "while".
      around: the computation it stands in.
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
    # The loop's state is one tuple, outside, in the condition and in the body; the counter is one of its elements.
    step = body[root.operands[int(place[1])]]
    first = _constant(start.operands[int(place[1])], outside)
    stop = _constant(test.operands[1], condition)
    if first is None or stop is None or step.kind != "add" or 1 not in [_constant(x, body) for x in step.operands[:2]]:
        return None
    return max(stop - first, 0)


def _constant(name: str, instructions: dict[str, Instruction]) -> int | None:
    """The integer that an instruction gives; None where it is not a constant, or passed on from one."""
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
      times: how often each bundle is issued, both sides of a predicated region taken.
      copied_bytes: what its copies move to and from HBM.
      unknown_loops: how many loops, counted once, have a trip count that is not a constant.
    """

    times: list[int]
    copied_bytes: int
    unknown_loops: int

    @property
    def cycles(self) -> int:
        return sum(self.times)


@dataclasses.dataclass(frozen=True)
class _Bundle:
    depth: int  # how many loops it is in
    opens_loop: bool
    trips: list[int]  # trip counts that a loop's exit is tested against
    copied_bytes: int


def read_schedule(text: str) -> Schedule:
    """Reads a kernel's SCHEDULE_DUMP."""
    bundles = _read_bundles(text)
    times, unknown = [1] * len(bundles), 0
    opening = [i for i, bundle in enumerate(bundles) if bundle.opens_loop]
    for start in opening:
        inside = _loop_bundles(bundles, start, opening)
        trips = [n for i in inside if bundles[i].depth == bundles[start].depth for n in bundles[i].trips]
        unknown += len(trips) != 1
        for i in inside:
            times[i] *= max(trips, default=1)
    copied = sum(bundle.copied_bytes * n for bundle, n in zip(bundles, times, strict=True))
    return Schedule(times, copied, unknown)


def _read_bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in text.splitlines():
        head = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(L[HBE]|P[BF]|CT)?\s*:\s*(>*)\s*\{", line)
        if not head:
            continue
        # An empty bundle does not show its depth: it is as deep as the one before.
        depth = len(head[2]) or (bundles[-1].depth if "{}" in line and bundles else 0)
        trips = re.findall(r"totalorder (?:\([^)]*\), )?%\w+, (\d+) /\* loop exit test", line)
        copies = re.findall(r"(?<!for )%\d+ = dma\.(?:hbm_to_\w+|\w+_to_hbm) [^;]*?/\*size_in_granules=\*/(\d+)", line)
        copied = GRANULE_BYTES * sum(map(int, copies))
        bundles.append(_Bundle(depth, head[1] == "LB", [int(n) for n in trips], copied))
    return bundles


def _loop_bundles(bundles: list[_Bundle], start: int, opening: list[int]) -> range:
    """A loop's bundles: up to the last one as deep as its first, before a loop no deeper opens."""
    depth = bundles[start].depth
    limit = next((i for i in opening if i > start and bundles[i].depth <= depth), len(bundles))
    return range(start, 1 + max(i for i in range(start, limit) if bundles[i].depth >= depth))


def read_utilization(text: str, times: list[int]) -> dict[str, float]:
    """Reads a kernel's UTILIZATION_DUMP, a line for each bundle.

    Args:
      text: the dump.
      times: how often each bundle is issued.

    Returns:
      The share of its issue slots that each unit uses, by the unit's name there: MXU, XLU (permutes and reductions
      across lanes), VALU, VPOP, EUP (exponentials, reciprocals), VLOAD and VSTORE (VLOAD:FILL and VSTORE:SPILL of
      them for registers that did not suffice), SALU. {} where the dump is not of that schedule.
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
