"""The attention layers that are timed against each other: ours, and those of other libraries that are installed.

All of them have the same weights: fused qkv with a bias, a projection with a bias, and nine taps a head.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import ArrayLike

from castling_jax.models.attention.core import Core, Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.attention.kinds import make_core
from castling_jax.models.layers import Layers

MASK_THRESHOLD = 0.02  # for training forms; their cost on a CPU does not depend on it
SOFTMAX, INFERENCE, TRAINING = "softmax", "castling, inference form", "castling, training form"
# Name -> attention and form of the layers and models that are always timed.
OURS = {SOFTMAX: ("softmax", "inference"), INFERENCE: ("castling", "inference"), TRAINING: ("castling", "train")}
# The modules that have held Equimo's layer, the newest first.
EQUIMO_MODULES = ("equimo.vision.layers.attention", "equimo.layers.attention")


@dataclass(frozen=True)
class Layer:
    """An attention layer with its projections.

    Attributes:
      name: its name in the table.
      same_as: the name of our layer that computes the same.
      quadratic: whether its time is quadratic in the tokens.
      prepare: (x [batch, tokens, channels], backward) -> a call without arguments that runs the layer once: forward, or
        the gradients with respect to the weights and x.
    """

    name: str
    same_as: str
    quadratic: bool
    prepare: Callable[[np.ndarray, bool], Callable[[], Any]]


def our_layers(channels: int, heads: int) -> tuple[list[Layer], dict[str, np.ndarray]]:
    """Our attention layers, and the weights that they share.

    Returns:
      The layers; and qkv [channels, 3 channels], qkv_bias, proj [channels, channels], proj_bias, taps [9, heads].

    Raises:
      InputError: the heads do not divide the channels.
    """
    layers = []
    for name, (attention, form) in OURS.items():
        module = _our_module(attention, form, channels, heads)
        if module.token_kernel is not None:  # zero in a new layer, which would hide it from a comparison
            module.token_kernel[...] = jax.random.normal(jax.random.key(1), module.token_kernel.shape) / 3
            taps = np.asarray(module.token_kernel[...])
        layers.append(_our_layer(name, module))
    weights = {"taps": taps}
    for part in ("qkv", "proj"):
        weights[part] = np.asarray(getattr(module, part).kernel[...])
        weights[f"{part}_bias"] = np.asarray(getattr(module, part).bias[...])
    return layers, weights


def rival_layers(attentions: Sequence[str], channels: int, heads: int) -> list[Layer]:
    """Layers of our other attentions in inference form, with parameters of their own.

    Raises:
      InputError: an attention is unknown, or the heads do not divide the channels.
    """
    return [_our_layer(name, _our_module(name, "inference", channels, heads)) for name in attentions]


def _our_module(attention: str, form: str, channels: int, heads: int) -> Any:
    return make_module(make_core(attention, form, token_conv="1d"), channels, heads, "float32")


def make_module(core: Core, channels: int, heads: int, dtype: str) -> Any:
    """An attention with its projections: the module that its kind brings, or multi-head attention."""
    layers = Layers(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return (core.kind.module or MultiHeadAttention)(channels, heads, core, layers, qkv_bias=True)


def _our_layer(name: str, module: Any) -> Layer:
    graphdef, parameters = nnx.split(module, nnx.Param)
    run = functools.partial(run_module, graphdef)
    return Layer(name, name, not module.core.kind.linear, functools.partial(_prepare_jax, run, parameters))


def places_of(tokens: int) -> Places:
    """Where a layer's tokens stand: on the largest square grid, the rest before it; 197 tokens are 1 and 14 x 14."""
    side = math.isqrt(tokens)
    return Places((side, side), tokens - side * side)


def run_module(graphdef: Any, parameters: Any, x: jax.Array, threshold: ArrayLike = MASK_THRESHOLD) -> jax.Array:
    """The output of a module from `make_module`, with the tokens where `places_of` puts them."""
    threshold = jnp.asarray(threshold, jnp.float32)
    return nnx.merge(graphdef, parameters)(x, places=places_of(x.shape[1]), mask_threshold=threshold)[0]


def _prepare_jax(run: Callable[..., jax.Array], parameters: Any, x: np.ndarray, backward: bool) -> Callable[[], Any]:
    array = jnp.asarray(x)
    if not backward:
        return functools.partial(jax.jit(run), parameters, array)
    gradients = jax.grad(lambda parameters, y: jnp.vdot(run(parameters, y), array), argnums=(0, 1))
    return functools.partial(jax.jit(gradients), parameters, array)


def torch_layers(weights: dict[str, np.ndarray]) -> list[Layer]:
    """PyTorch's softmax attention and the castling block in plain PyTorch, or nothing where it is not installed."""
    if not importlib.util.find_spec("torch"):
        return []
    import torch
    from torch.nn import functional

    taps, heads = weights["taps"], weights["taps"].shape[1]
    parameters = {name: torch.tensor(weights[name].T.copy()).requires_grad_() for name in weights if name != "taps"}
    kernel = torch.tensor(taps.T[:, None, :, None].copy()).requires_grad_()

    def layer(attend: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        qkv = functional.linear(x, parameters["qkv"], parameters["qkv_bias"])
        qkv = qkv.reshape(*x.shape[:2], 3, heads, x.shape[2] // heads)
        q, k, v = (part.transpose(1, 2).contiguous() for part in qkv.unbind(2))
        out = attend(q, k, v).transpose(1, 2).reshape(x.shape)
        return functional.linear(out, parameters["proj"], parameters["proj_bias"])

    def castling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        core = torch.add(0.5 * v, q @ (k.transpose(-2, -1) @ v), alpha=1 / math.pi)
        convolved = functional.conv2d(v, kernel, padding=(len(taps) // 2, 0), groups=heads)
        return functional.normalize(core, dim=-1) + convolved

    def prepare(attend: Callable[..., torch.Tensor], x: np.ndarray, backward: bool) -> Callable[[], Any]:
        tensor = torch.tensor(x)

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return layer(attend, tensor)

        def gradients() -> Any:
            y = tensor.clone().requires_grad_()
            used = [*parameters.values(), *([kernel] if attend is castling else []), y]
            return torch.autograd.grad((layer(attend, y) * tensor).sum(), used)

        return gradients if backward else forward

    return [
        Layer("softmax, PyTorch", SOFTMAX, True, functools.partial(prepare, functional.scaled_dot_product_attention)),
        Layer("castling, inference form, PyTorch", INFERENCE, False, functools.partial(prepare, castling)),
    ]


def equimo_layers(weights: dict[str, np.ndarray]) -> list[Layer]:
    """Equimo's linear-angular attention, without and with its masked branch, or nothing where it is not installed."""
    modules = [name for name in EQUIMO_MODULES if _exists(name)]
    if not modules:
        return []
    import equinox

    attention = importlib.import_module(modules[0]).LinearAngularAttention
    channels, heads = len(weights["proj"]), weights["taps"].shape[1]
    layers = []
    for name, masked in ((INFERENCE, False), (TRAINING, True)):
        layer = attention(channels, heads, sparse_reg=masked, sparsity_threshold=MASK_THRESHOLD, key=jax.random.key(0))
        layer = equinox.tree_at(
            lambda tree: (tree.qkv.weight, tree.qkv.bias, tree.proj.weight, tree.proj.bias, tree.dconv.weight),
            layer,
            (
                jnp.asarray(weights["qkv"].T),
                jnp.asarray(weights["qkv_bias"]),
                jnp.asarray(weights["proj"].T),
                jnp.asarray(weights["proj_bias"]),
                jnp.asarray(weights["taps"].T[:, None, :, None]),
            ),
        )
        arrays, static = equinox.partition(layer, equinox.is_array)

        def run(arrays: Any, x: jax.Array, static: Any = static) -> jax.Array:
            one = equinox.combine(arrays, static)
            return jax.vmap(lambda tokens: one(tokens, key=jax.random.key(0), inference=True))(x)

        layers.append(Layer(f"{name}, Equimo", name, masked, functools.partial(_prepare_jax, run, arrays)))
    return layers


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above the module is missing
        return False
