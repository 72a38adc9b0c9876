"""Counts the multiply-accumulates and activations of a forward pass, in total and for each part of the model."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.model import Model
from castling_jax.models.variables import apply, get_variables
from castling_jax.sizes import ImageSize, image_shape

BEFORE_ATTENTION = ("patch_embed", "stem", "shortcut", "qkv", "pool", "relative_positions")
AFTER_ATTENTION = ("token_kernel", "proj", "mlp", "pyramid", "neck", "head", "decoder")
OTHER = "other"  # the part of work outside all scopes


def parts() -> tuple[str, ...]:
    """The names of the scopes (jax.named_scope) around parts of models and attention kinds, in a forward pass's order.

    Work in nested scopes belongs to the innermost one.
    """
    attention = dict.fromkeys(part for kind in KINDS.values() for part in kind.parts)
    return (*BEFORE_ATTENTION, *attention, *AFTER_ATTENTION)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one image: multiply-accumulates, and activations, the numbers that the counted operations output."""

    macs: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.activations + other.activations)


def count_costs(model: Model, image_size: ImageSize | None = None) -> dict[str, Cost]:
    """The cost of one image's forward pass, for each of `parts` that the model has.

    The counts come from the traced program. Matrix products, convolutions and the attention's taps count, with the
    products inside attention, as in the papers' figures; elementwise work (norms, softmax, GELU) and the resizing of
    maps and positions do not. Activations are the outputs of these same operations, as fvcore counts them. In a
    castling model's training form both attentions count.

    Args:
      model: the model, which may hold shapes only.
      image_size: pixels a side, or (height, width); None is the model's own.
    """
    size = image_shape(image_size or model.spec.image_size)
    images = jax.ShapeDtypeStruct((1, *size, model.in_chans), jnp.float32)
    # A traced threshold keeps the branch in the program.
    jaxpr = jax.make_jaxpr(lambda variables, images, t: apply(model, variables, images, mask_threshold=t))(
        get_variables(model), images, jax.ShapeDtypeStruct((), jnp.float32)
    )
    costs: dict[str, Cost] = {}
    for part, cost in _costs(jaxpr.jaxpr, OTHER, parts()):
        costs[part] = costs.get(part, Cost()) + cost
    return {part: costs[part] for part in (*parts(), OTHER) if part in costs}


def count_macs(model: Model, image_size: ImageSize | None = None) -> int:
    """Multiply-accumulates of one image's forward pass: the sum over `count_costs`."""
    return sum(cost.macs for cost in count_costs(model, image_size).values())


def _costs(jaxpr: Jaxpr, outer: str, known: tuple[str, ...]) -> Iterator[tuple[str, Cost]]:
    """(part, cost) of each counted operation. A part is one of `known`, or `outer`, the part that calls the program."""
    for equation in jaxpr.eqns:
        scopes = str(equation.source_info.name_stack).split("/")
        part = next((name for name in reversed(scopes) if name in known), outer)
        name = equation.primitive.name
        shapes: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        size = shapes[-1].size if shapes else 0
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            # Each number of the result is a sum over the contracted axes, one multiply-accumulate for each term.
            yield part, Cost(size * math.prod(shapes[0].shape[axis] for axis in contracted), size)
        elif name == "conv_general_dilated":
            # The kernel has the channels of one group, so that grouped convolutions count right without their groups.
            kernel = shapes[1]
            features = equation.params["dimension_numbers"].rhs_spec[0]
            yield part, Cost(size * kernel.size // kernel.shape[features], size)
        elif equation.params.get("name") in ("_depthwise_taps", "convolve_taps"):
            # These jitted functions are not entered: what a platform computes for the taps may be more than the taps.
            yield part, Cost(size * math.prod(shapes[1].shape[:-1]), size)
        elif equation.params.get("name") == "interpolate":
            # XLA may resize by dense products with the filter's weights, nearly all of which are zero.
            continue
        elif equation.params.get("branches_platforms"):
            # The branches are one computation, written for several platforms: the default branch counts.
            forms = zip(equation.params["branches_platforms"], equation.params["branches"], strict=True)
            for platforms, form in forms:
                if platforms is None:
                    yield from _costs(form.jaxpr, part, known)
        else:
            for inner in _inner(equation.params):
                yield from _costs(inner, part, known)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
