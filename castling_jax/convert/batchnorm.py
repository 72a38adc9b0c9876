"""Folding batch norm, whose statistics are constants at inference, into the linear or convolution layer beside it.

A node of the tree that is to be folded has two children, `linear` and `bn`. Which of the two comes first can be read
off the tree: a layer that batch norm follows has no bias, since batch norm brings one; a layer that has a bias comes
after (LeViT's classifier heads).
"""

from collections.abc import Callable
from typing import Any

import jax

from castling_jax.errors import InputError
from castling_jax.models.layers import BATCH_NORM_EPSILON as EPSILON
from castling_jax.ops.mesh import on_auto_axes, split_as


def fold_batch_norms(params: dict[str, Any], batch_stats: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The parameter tree with every {linear, bn} node turned into {linear: {kernel, bias}}.

    Args:
      params: nested dicts; kernels are [..., in, out].
      batch_stats: the same nesting, {mean, var} under each `bn`.
      path: where this node stands, for messages.

    Returns:
      A new tree; the leaves that were not folded are the same objects.

    Raises:
      InputError: a batch norm lacks its scale, bias, mean, var or the layer it belongs to, has others or of another
        shape, or a convolution follows it.
    """
    for name, statistics in batch_stats.items():
        if name not in params:
            raise InputError(f"batch_stats has '{path}{name}', which params lacks.")
        if not isinstance(params[name], dict) or not isinstance(statistics, dict):
            raise InputError(f"'{path}{name}' must be a dict of arrays both in params and in batch_stats.")
    if "bn" not in params:
        return {
            name: fold_batch_norms(child, batch_stats.get(name, {}), f"{path}{name}/")
            if isinstance(child, dict)
            else child
            for name, child in params.items()
        }
    layer = params.get("linear", {})
    if "kernel" not in layer:
        raise InputError(f"the batch norm cannot be folded: 'params/{path}linear/kernel' is missing.")
    channels = layer["kernel"].shape[-2 if "bias" in layer else -1 :][:1]
    norm = _complete(params["bn"], ("scale", "bias"), channels, f"params/{path}bn")
    statistics = _complete(batch_stats.get("bn", {}), ("mean", "var"), channels, f"batch_stats/{path}bn")
    if "bias" in layer and len(layer["kernel"].shape) != 2:
        raise InputError(
            f"the batch norm 'params/{path}bn' cannot be folded into the convolution after it, of kernel "
            f"{layer['kernel'].shape}: at the border it sees zeros, not the norm's shift."
        )
    folded = _fold_before if "bias" in layer else _fold_after
    rest = {name: child for name, child in params.items() if name not in ("bn", "linear")}
    return rest | {"linear": folded(layer, norm["scale"], norm["bias"], statistics["mean"], statistics["var"])}


def _complete(node: dict[str, Any], names: tuple[str, ...], shape: tuple[int, ...], path: str) -> dict[str, Any]:
    for name in names:
        if name not in node:
            raise InputError(f"the batch norm cannot be folded: '{path}/{name}' is missing.")
        if node[name].shape != shape:
            raise InputError(f"the batch norm cannot be folded: '{path}/{name}' is {node[name].shape}, not {shape}.")
    for name in node.keys() - names:
        raise InputError(f"the batch norm cannot be folded: '{path}/{name}' is not known there.")
    return node


def _fold_after(layer, scale, bias, mean, var):
    """bn(x @ kernel) as one affine layer."""
    return {
        "kernel": _in_its_dtype(
            lambda kernel, scale, var: kernel * (scale * (var + EPSILON) ** -0.5), layer["kernel"], scale, var
        ),
        "bias": _in_its_dtype(
            lambda bias, scale, mean, var: bias - mean * scale * (var + EPSILON) ** -0.5, bias, scale, mean, var
        ),
    }


def _fold_before(layer, scale, bias, mean, var):
    """bn(x) @ kernel + bias as one affine layer."""
    return {
        "kernel": _in_its_dtype(
            lambda kernel, scale, var: kernel * (scale * (var + EPSILON) ** -0.5)[:, None], layer["kernel"], scale, var
        ),
        "bias": _in_its_dtype(
            # Multiplied and summed rather than @: of float32 a TPU's product would be rounded to bfloat16.
            lambda own, kernel, scale, bias, mean, var: (
                own + ((bias - mean * scale * (var + EPSILON) ** -0.5)[:, None] * kernel).sum(0)
            ),
            layer["bias"],
            layer["kernel"],
            scale,
            bias,
            mean,
            var,
        ),
    }


def _in_its_dtype(function: Callable[..., Any], like: Any, *others: Any) -> Any:
    """`compute`, and rounded to `like`'s dtype: of bfloat16 parameters the statistics are still float32."""
    return compute(lambda like, *others: function(like, *others).astype(like.dtype), like, *others)


def compute(function: Callable[..., Any], like: Any, *others: Any) -> Any:
    """function(like, *others) for numpy arrays, jax arrays, tracers or ShapeDtypeStructs, laid out as `like` is."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in (like, *others)):
        shape = jax.eval_shape(function, like, *others)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=getattr(like, "sharding", None))
    out = on_auto_axes(lambda like: split_as(like, *range(like.ndim)))(function)(like, *others)
    if isinstance(like, jax.Array) and not isinstance(out, jax.core.Tracer) and like.committed:
        out = jax.device_put(out, like.sharding)
    return out
