"""Pallas calls by name: inputs, outputs and scratch arrays have names, and a kernel reads its refs by these names."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl

Refs = types.SimpleNamespace  # a kernel's refs by name: refs.q, refs.out
Operand = tuple[Any, pl.BlockSpec]  # an array, or None where it is absent, and its blocks
ABSENT: Operand = (None, pl.BlockSpec())


def call(
    kernel: Callable[[Refs], None],
    *,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    scratch: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Calls a kernel with named refs. A name stands for one input, output or scratch array only.

    Args:
      kernel: gets one namespace with all refs. The ref of an absent input or output is None.
      inputs: name -> (array, its blocks), in the order of the program's operands. An array of None is absent.
      outputs: name -> (an array or shape that the output is like, its blocks). None is absent here too, so that the
        entry of an input serves as the entry of its gradient.
      scratch: name -> memory that the kernel keeps between grid steps.
      aliases: input -> the output that is written in the input's place. An absent input is passed over.
      **options: grid, compiler_params, interpret and name, as `pl.pallas_call` takes them.

    Returns:
      The outputs by name. An absent output is None.
    """
    scratch = scratch or {}
    present_inputs, present_outputs = _present(inputs), _present(outputs)

    def kernel_by_position(*refs: Any) -> None:
        remaining = iter(refs)
        named = [
            {name: None if array is None else next(remaining) for name, (array, _) in operands.items()}
            for operands in (inputs, outputs)
        ]
        kernel(Refs(**named[0], **named[1], **dict(zip(scratch, remaining, strict=True))))

    input_names, output_names = list(present_inputs), list(present_outputs)
    results = pl.pallas_call(
        kernel_by_position,
        in_specs=[blocks for _, blocks in present_inputs.values()],
        out_specs=[blocks for _, blocks in present_outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in present_outputs.values()],
        scratch_shapes=list(scratch.values()),
        input_output_aliases={
            input_names.index(name): output_names.index(output)
            for name, output in (aliases or {}).items()
            if name in present_inputs
        },
        **options,
    )(*(array for array, _ in present_inputs.values()))
    return dict.fromkeys(outputs) | dict(zip(output_names, results, strict=True))


def _present(operands: Mapping[str, Operand]) -> dict[str, Operand]:
    return {name: operand for name, operand in operands.items() if operand[0] is not None}


def whole(array: jax.Array) -> Operand:
    """An input that every grid step reads whole."""
    return array, pl.BlockSpec(array.shape, lambda *step: (0,) * array.ndim)
