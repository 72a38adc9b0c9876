"""Folds batch norm, whose statistics are constants at inference, into the linear or convolution layer beside it.

A node of the tree to fold has two children, `linear` and `bn`. The tree shows which of the two comes first: a layer
before batch norm has no bias, because batch norm brings one; a layer with a bias comes after batch norm (LeViT's
classifier heads).
"""

from collections.abc import Callable
from typing import Any

import jax

from castling_jax.errors import InputError, check
from castling_jax.models.batch_norm import BATCH_NORM_EPSILON as EPSILON
from castling_jax.ops.mesh import on_auto_axes, split_as


def fold_batch_norms(params: dict[str, Any], batch_stats: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Turns every {linear, bn} node of the parameter tree into {linear: {kernel, bias}}.

    Args:
      params: nested dicts; kernels are [..., in, out].
      batch_stats: nested dicts like params, with {mean, var} under each `bn`.
      path: path of this node in the whole tree, for messages.

    Returns:
      A new tree; leaves that were not folded are the same objects as before.

    Raises:
      InputError: a batch norm lacks its scale, bias, mean, var or its layer; has other arrays or other shapes; or a
        convolution follows it.
    """
    for name, statistics in batch_stats.items():
        check(name in params, f"batch_stats has '{path}{name}', which params lacks.")
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
    check("kernel" in layer, f"the batch norm cannot be folded: 'params/{path}linear/kernel' is missing.")
    # The norm has the layer's input channels if it comes before the layer, else its output channels.
    channels = layer["kernel"].shape[-2 if "bias" in layer else -1 :][:1]
    norm = _complete(params["bn"], ("scale", "bias"), channels, f"params/{path}bn")
    statistics = _complete(batch_stats.get("bn", {}), ("mean", "var"), channels, f"batch_stats/{path}bn")
    if "bias" in layer and len(layer["kernel"].shape) != 2:
        after = f"the convolution after it, which pads with zeros (kernel {layer['kernel'].shape})"
        raise InputError(f"the batch norm 'params/{path}bn' cannot be folded into {after}.")
    folded = _fold_before if "bias" in layer else _fold_after
    rest = {name: child for name, child in params.items() if name not in ("bn", "linear")}
    return rest | {"linear": folded(layer, norm["scale"], norm["bias"], statistics["mean"], statistics["var"])}


def _complete(node: dict[str, Any], names: tuple[str, ...], shape: tuple[int, ...], path: str) -> dict[str, Any]:
    for name in names:
        check(name in node, f"the batch norm cannot be folded: '{path}/{name}' is missing.")
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
            # A product and a sum instead of @, because a TPU rounds the factors of a float32 matmul to bfloat16.
            lambda layer_bias, kernel, scale, bias, mean, var: (
                layer_bias + ((bias - mean * scale * (var + EPSILON) ** -0.5)[:, None] * kernel).sum(0)
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
    """`compute`, rounded to `like`'s dtype: next to bfloat16 parameters the statistics are still float32."""
    return compute(lambda like, *others: function(like, *others).astype(like.dtype), like, *others)


def compute(function: Callable[..., Any], like: Any, *others: Any) -> Any:
    """function(like, *others) for numpy arrays, jax arrays, tracers or ShapeDtypeStructs, sharded as `like` is."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in (like, *others)):
        shape = jax.eval_shape(function, like, *others)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=getattr(like, "sharding", None))
    out = on_auto_axes(lambda like: split_as(like, *range(like.ndim)))(function)(like, *others)
    # Only a committed array says where the result belongs; an uncommitted one may move freely, and so may the result.
    if isinstance(like, jax.Array) and not isinstance(out, jax.core.Tracer) and like.committed:
        out = jax.device_put(out, like.sharding)
    return out
