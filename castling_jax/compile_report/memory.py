"""The activations in a program's temporary memory.

The scheduled program gives the order of its operations: an array takes HBM from the operation that makes it to the last
operation that uses it. The activations are the arrays of the forward pass that the backward pass still needs.
"""

import collections

from castling_jax.compile_report.dump import SHAPE, Instruction, Program, shape_bytes

# Operations that make no array, only another name for their operands or parts of them.
ALIASES = ("bitcast", "tuple", "get-tuple-element", "optimization-barrier", "copy-done", "opt-barrier", "reshape")
ELSEWHERE = ("parameter", "constant")  # their HBM is counted with the arguments, or they have none


def activation_bytes(program: Program) -> int:
    """The most bytes of the forward pass's arrays at one time; 0 for a program that does not differentiate.

    This is an estimate: where an array is changed in place, each version counts while it is used.
    """
    order = program.computations[program.entry]
    # An alias has no array, so its users keep the arrays behind it alive.
    sources: dict[str, tuple[str, ...]] = {}  # an instruction -> the instructions that made its arrays
    sizes: dict[str, int] = {}
    last: dict[str, int] = {}
    made = {instruction.name for instruction in order}
    for time, instruction in enumerate(order):
        used = tuple(dict.fromkeys(s for name in instruction.operands if name in made for s in sources.get(name, ())))
        last.update(dict.fromkeys(used, time))
        if instruction.kind in ALIASES:
            sources[instruction.name] = used
        elif instruction.kind not in ELSEWHERE:
            sources[instruction.name] = (instruction.name,)
            if is_forward(instruction.label):
                sizes[instruction.name] = hbm_bytes(instruction)
    ending: dict[int, int] = collections.Counter()
    for name, size in sizes.items():
        ending[last.get(name, -1)] += size
    alive = most = 0
    for time, instruction in enumerate(order):
        alive += sizes.get(instruction.name, 0) if instruction.name in last else 0
        most = max(most, alive)
        alive -= ending[time]
    return most


def is_forward(label: str) -> bool:
    """Whether an operation belongs to the forward pass of a function that is differentiated."""
    return "jvp(" in label and "transpose(" not in label


def hbm_bytes(instruction: Instruction) -> int:
    """Bytes of an instruction's result in HBM; a layout with S(1) or another S( means faster memory."""
    total = 0
    result = instruction.result
    for shape in SHAPE.finditer(result):
        layout = result[shape.end() :].partition("}")[0]
        total += 0 if "S(" in layout else shape_bytes(shape[0])
    return total
