"""What a program's temporary memory is made of, by when it is made and last used.

The scheduled program says in which order its operations run: an array takes up HBM from the operation that makes it to
the last one that uses it. What the forward pass has made and the backward pass still needs are its activations.
"""

import collections

from castling_jax.compile_report.dump import SHAPE, Instruction, Program, shape_bytes

# These make no array, but another name for (parts of) those that they take.
ALIASES = ("bitcast", "tuple", "get-tuple-element", "optimization-barrier", "copy-done", "opt-barrier", "reshape")
ELSEWHERE = ("parameter", "constant")  # HBM that is counted with the arguments, or none


def activation_bytes(program: Program) -> int:
    """Bytes of the forward pass's arrays that are there at once, at most; 0 of a program that does not differentiate.

    An estimate: of arrays that are changed in place each version counts while it is used.
    """
    order = program.computations[program.entry]
    sources: dict[str, tuple[str, ...]] = {}  # an instruction -> the instructions that made what it names
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
    """Whether an operation is of the forward pass of something that is differentiated."""
    return "jvp(" in label and "transpose(" not in label


def hbm_bytes(instruction: Instruction) -> int:
    """Bytes of an instruction's result that are in HBM: S(1) and others say that an array is in faster memory."""
    total = 0
    result = instruction.result
    for shape in SHAPE.finditer(result):
        layout = result[shape.end() :].partition("}")[0]
        total += 0 if "S(" in layout else shape_bytes(shape[0])
    return total
