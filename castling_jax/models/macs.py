"""Counting multiply-accumulates of a forward pass."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from castling_jax.models.backbone import Backbone
from castling_jax.models.variables import apply, get_variables


def count_macs(model: Backbone, image_size: int | None = None) -> int:
    """Multiply-accumulates of one image's forward pass: matrix products, convolutions and the attention's taps.

    Counted from the traced program, so that attention's own products are in, as in the papers' figures; elementwise
    work (norms, softmax, GELU) is not. Of a castling model in training form both attentions count.

    Args:
      model: may hold shapes only.
      image_size: pixels a side; None is the model's own.
    """
    size = image_size or model.spec.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    # A traced threshold keeps the branch in the program.
    jaxpr = jax.make_jaxpr(lambda variables, images, t: apply(model, variables, images, mask_threshold=t))(
        get_variables(model), images, jax.ShapeDtypeStruct((), jnp.float32)
    )
    return _count(jaxpr.jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        shapes: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += shapes[-1].size * math.prod(shapes[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = shapes[1]
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += shapes[-1].size * kernel.size // kernel.shape[features]
        elif equation.params.get("name") == "_depthwise_taps":
            total += shapes[-1].size * math.prod(shapes[1].shape[:-1])
        elif equation.params.get("branches_platforms"):
            # One computation in a form for each platform: counted in that of no platform in particular.
            forms = zip(equation.params["branches_platforms"], equation.params["branches"], strict=True)
            total += sum(_count(form.jaxpr) for platforms, form in forms if platforms is None)
        else:
            total += sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
