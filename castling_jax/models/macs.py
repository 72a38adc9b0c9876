"""Counting multiply-accumulates and activations of a forward pass, in all and part by part."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import apply, get_variables

# The scopes (jax.named_scope) that models and operations put around their parts, in the order of a forward pass. The
# innermost counts: a part stands inside no other.
PARTS = (
    "patch_embed",
    "stem",
    "shortcut",
    "qkv",
    "pool",
    "softmax",
    "masked_softmax",
    "relative_positions",
    "angular",
    "linear_angular",
    "token_kernel",
    "proj",
    "mlp",
    "head",
)
OTHER = "other"  # what no scope names, such as the resizing of positions to another grid


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one image: multiply-accumulates, and activations, the numbers that the counted operations give out."""

    macs: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.activations + other.activations)


def count_costs(model: Backbone, image_size: int | None = None) -> dict[str, Cost]:
    """The cost of one image's forward pass by part, of PARTS those that the model has.

    Counted from the traced program, so that attention's own products are in, as in the papers' figures: matrix
    products, convolutions and the attention's taps are, elementwise work (norms, softmax, GELU) is not. Activations
    are the results of these same operations, as fvcore counts them. Of a castling model in training form both
    attentions count.

    Args:
      model: may hold shapes only.
      image_size: pixels a side; None is the model's own.
    """
    size = image_size or model.spec.image_size
    images = jax.ShapeDtypeStruct((1, size, size, model.in_chans), jnp.float32)
    # A traced threshold keeps the branch in the program.
    jaxpr = jax.make_jaxpr(lambda variables, images, t: apply(model, variables, images, mask_threshold=t))(
        get_variables(model), images, jax.ShapeDtypeStruct((), jnp.float32)
    )
    costs: dict[str, Cost] = {}
    for part, cost in _costs(jaxpr.jaxpr, OTHER):
        costs[part] = costs.get(part, Cost()) + cost
    return {part: costs[part] for part in (*PARTS, OTHER) if part in costs}


def count_macs(model: Backbone, image_size: int | None = None) -> int:
    """Multiply-accumulates of one image's forward pass, all of `count_costs`."""
    return sum(cost.macs for cost in count_costs(model, image_size).values())


def _costs(jaxpr: Jaxpr, outer: str) -> Iterator[tuple[str, Cost]]:
    """Each counted operation's part and cost; `outer` is the part that the program is called in."""
    for equation in jaxpr.eqns:
        part = next(
            (name for name in reversed(str(equation.source_info.name_stack).split("/")) if name in PARTS), outer
        )
        name = equation.primitive.name
        shapes: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        size = shapes[-1].size if shapes else 0
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield part, Cost(size * math.prod(shapes[0].shape[axis] for axis in contracted), size)
        elif name == "conv_general_dilated":
            kernel = shapes[1]
            features = equation.params["dimension_numbers"].rhs_spec[0]
            yield part, Cost(size * kernel.size // kernel.shape[features], size)
        elif equation.params.get("name") == "_depthwise_taps":
            yield part, Cost(size * math.prod(shapes[1].shape[:-1]), size)
        elif equation.params.get("branches_platforms"):
            # One computation in a form for each platform: counted in that of no platform in particular.
            forms = zip(equation.params["branches_platforms"], equation.params["branches"], strict=True)
            for platforms, form in forms:
                if platforms is None:
                    yield from _costs(form.jaxpr, part)
        else:
            for inner in _inner(equation.params):
                yield from _costs(inner, part)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
