"""The switch: from the trained parameter tree to the inference tree, which has no softmax branch.

King and rook castle: the masked softmax branch's parameters are dropped, batch norm is folded, and the result is
exactly the tree of `create_model(..., form="inference")`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, DTypeLike, Float

from castling_jax.convert.batchnorm import compute, fold_batch_norms
from castling_jax.errors import InputError, check_known, takes
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import COLLECTIONS, MODEL, VARIABLES, Variables, apply
from castling_jax.ops.checks import concrete_threshold

SOFTMAX_BRANCH = "softmax_branch"  # the key under which castling models keep parameters that only the branch uses


def to_inference(variables: Variables, *, dtype: DTypeLike | None = None) -> Variables:
    """Turns variables into those of the inference form. The tree alone shows what to do, so no model is needed.

    Drops every `softmax_branch`; folds batch norm into the layer beside it; and averages two heads into one if no
    distillation token feeds the second (LeViT). Linear-angular trees pass through; softmax trees are folded. In a DeiT
    the branch has no parameters, so the result holds the same arrays.

    Args:
      variables: {"params": ..., "batch_stats": ...} of numpy arrays, jax arrays (whose shardings are kept), tracers or
        ShapeDtypeStructs; not modified. `params` may be an exponential moving average.
      dtype: floating type to which floating-point leaves are cast; None leaves them as they are.

    Returns:
      {"params": ...}: new dicts.

    Raises:
      InputError: `params` is missing, a collection is unknown or holds other things than arrays, a batch norm is
        incomplete, two heads to average differ in shape, or `dtype` is no floating type.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise InputError('the variables lack "params": give {"params": {...}} as get_variables returns it.')
    for collection in variables:
        check_known("collection of variables", collection, COLLECTIONS)
    if dtype is not None and not _is_floating(dtype):
        raise InputError(f"dtype must be a floating type such as bfloat16, not {dtype!r}.")
    params, batch_stats = (_without_branch(variables.get(name, {}), name) for name in ("params", "batch_stats"))
    # Before the heads are averaged: each head has a batch norm of its own.
    params = fold_batch_norms(params, batch_stats)
    if "head_dist" in params and "dist_token" not in params:
        second = params.pop("head_dist")
        if _shapes(params.get("head")) != _shapes(second):
            raise InputError("'params/head' and 'params/head_dist' must have the same arrays, to be averaged.")
        params["head"] = jax.tree.map(lambda a, b: compute(lambda a, b: (a + b) / 2, a, b), params["head"], second)
    # Last, so that folding and averaging compute in the parameters' own precision.
    if dtype is not None:
        params = jax.tree.map(lambda leaf: _cast(leaf, jnp.dtype(dtype)), params)
    return {"params": params}


def _without_branch(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise InputError(f"{path!r} must be nested dicts of arrays, not {type(tree).__name__}.")
    return {
        name: child if hasattr(child, "dtype") else _without_branch(child, f"{path}/{name}")
        for name, child in tree.items()
        if name != SOFTMAX_BRANCH
    }


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def _is_floating(dtype: DTypeLike) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _cast(leaf: Any, dtype: np.dtype) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == dtype:
        return leaf
    return compute(lambda leaf: leaf.astype(dtype), leaf)


def largest_difference(outputs: Any, others: Any, longer_side: int) -> Float[Array, ""]:
    """The largest absolute difference between two forms' outputs.

    Logits, a lone array, are compared as they are. In a dict each array's difference is divided by max(1, the largest
    magnitude in `others`), and that of "boxes" by the image's longer side, in pixels.
    """
    if not isinstance(outputs, Mapping):
        return jnp.max(jnp.abs(outputs - others))
    scales = {name: jnp.maximum(1, jnp.max(jnp.abs(other))) for name, other in others.items()}
    if "boxes" in scales:
        scales["boxes"] = jnp.float32(longer_side)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(outputs[name] - others[name])) / scales[name] for name in scales]))


@takes(model=MODEL, variables=VARIABLES)
def check_switch(
    model: Model,
    variables: Variables,
    images: Float[Array, "batch height width channels"],
    mask_threshold: ArrayLike,
) -> dict[str, Any]:
    """Compares a castling model's two forms on real images, before you trust the smaller one.

    Args:
      model: a model in training form, castling or with another attention that changes at the switch.
      variables: the model's variables.
      images: the images to compare the two forms on.
      mask_threshold: the threshold that training has reached.

    Returns:
      {"max_difference": the largest difference between the two forms' outputs at that threshold, as
       `largest_difference` has it,
       "densities": [layers], the share of softmax weights still kept there,
       "max_difference_at_one": the same difference at threshold 1, where the mask is empty: only float32's rounding.
       A LeViT that computes in bfloat16 shows bfloat16's rounding, a few hundredths, because folding batch norm into
       its kernels rounds them anew}.

    Raises:
      InputError: the model has no second form to compare, the threshold is negative or NaN, or `apply` refuses its
        arguments.
    """
    spec = model.spec
    if spec.form != "train" or KINDS[spec.attention].inference is None:
        raise InputError(
            f'only an attention that changes at the switch has two forms to compare, as attention="castling", '
            f'form="train", not attention={spec.attention!r}, form={spec.form!r}.'
        )
    concrete_threshold(mask_threshold)
    inference_model = abstract_model(**spec.arguments(form="inference"))

    @jax.jit
    def compare(variables, images, thresholds):
        inference_outputs = apply(inference_model, to_inference(variables), images)
        differences, densities = [], None
        for threshold in thresholds:
            outputs, kept = apply(model, variables, images, mask_threshold=threshold, return_densities=True)
            differences.append(largest_difference(outputs, inference_outputs, max(images.shape[1:3])))
            densities = kept if densities is None else densities
        return differences, densities

    # Both thresholds are traced, so the branch really runs at 1; a Python 1.0 would let the model leave it out.
    differences, densities = compare(variables, images, (jnp.float32(mask_threshold), jnp.float32(1)))
    return {
        "max_difference": float(differences[0]),
        "densities": np.asarray(densities),
        "max_difference_at_one": float(differences[1]),
    }
