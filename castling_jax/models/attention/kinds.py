"""The table of attention kinds: what happens between the projections, from q, k and v to the output.

A backbone makes q, k and v in its own way (one fused layer, pooled on a grid, every second token), and takes every kind
without a module. A new kind is an entry of KINDS, which all the rest reads, from `create_model` to the switch.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax import ops
from castling_jax.errors import InputError, check, check_known
from castling_jax.models.attention.bridge import BridgeAttention
from castling_jax.models.attention.convolutional import ConvolutionalAttention
from castling_jax.models.attention.core import INPUTS, TOKEN_KERNEL_SIZES, Core, Kind, Output
from castling_jax.models.attention.linear import (
    focus_parameters,
    focused_linear_attention,
    linear_taylor_attention,
    performer_attention,
    relu_linear_attention,
    taylor_attention,
)
from castling_jax.models.attention.separable import SeparableAttention, separable_attention
from castling_jax.models.attention.windows import WindowAttention
from castling_jax.ops.angular import normalize_and_convolve
from castling_jax.ops.bias import Bias, dense_bias
from castling_jax.ops.castling import MASK_KINDS
from castling_jax.ops.checks import check_implementation

FORMS = ("train", "inference")


@jax.named_scope("softmax")
def softmax_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    bias: Bias | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """softmax(Q K^T / sqrt(key_dim) + bias) V (Vaswani et al., 2017, equation 1)."""
    bias = None if bias is None else dense_bias(bias)
    if q.shape[3] == v.shape[3]:
        return jax.nn.dot_product_attention(q, k, v, bias=bias)
    # JAX's function only takes values as wide as the keys; LeViT's values are two or four times as wide.
    wide = jnp.promote_types(q.dtype, jnp.float32)  # in bfloat16 a large score would be off by a tenth
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) / math.sqrt(q.shape[3])
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def normalized_angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """l2normalise(Sim(Q, K) V), with the exact kernel; linear-angular attention has only two terms of its series."""
    # Normalised like castling's inference form, so that the two differ only in the kernel.
    out = ops.angular_attention(q, k, v)
    return normalize_and_convolve(out, out, None, grid=None, prefix_tokens=0)


_LINEAR_ANGULAR = Kind(
    "linear_angular",
    ops.linear_angular_attention,
    linear=True,
    parts=("linear_angular",),
    block=ops.linear_angular_block,
)
_CASTLING = Kind(
    "castling", ops.castling_attention, inference=_LINEAR_ANGULAR, parts=("masked_softmax", "linear_angular")
)
_LINEAR_TAYLOR = Kind("linear_taylor", linear_taylor_attention, linear=True, taps=False, parts=("linear_taylor",))
KINDS = {
    kind.name: kind
    for kind in (
        _CASTLING,
        _LINEAR_ANGULAR,
        Kind("softmax", softmax_attention, taps=False, parts=("softmax",)),
        Kind("angular", normalized_angular_attention, parts=("angular",)),
        Kind("softmax_taps", softmax_attention, parts=("softmax",)),
        Kind("relu_linear", relu_linear_attention, linear=True, taps=False, parts=("relu_linear",)),
        Kind("bridge", softmax_attention, linear=True, taps=False, parts=("softmax",), module=BridgeAttention),
        Kind("convolutional", softmax_attention, taps=False, parts=("softmax",), module=ConvolutionalAttention),
        Kind(
            "separable", separable_attention, linear=True, taps=False, parts=("separable",), module=SeparableAttention
        ),
        Kind("window", softmax_attention, linear=True, taps=False, parts=("softmax",), module=WindowAttention),
        Kind("relu_linear_taps", relu_linear_attention, linear=True, parts=("relu_linear",)),
        Kind(
            "focused_linear",
            focused_linear_attention,
            linear=True,
            parts=("focused_linear",),
            parameters=focus_parameters,
        ),
        Kind(
            "taylor",
            taylor_attention,
            taps=False,
            inference=_LINEAR_TAYLOR,
            parts=("taylor_branch", "linear_taylor"),
        ),
        _LINEAR_TAYLOR,
        Kind("performer", performer_attention, linear=True, taps=False, parts=("performer",)),
    )
}
# Copied before anything can be registered: `register_attention` refuses these names, but replaces registered ones.
BUILT_IN = frozenset(KINDS)


def make_core(
    attention: str,
    form: str,
    *,
    token_conv: str | None,
    token_kernel_size: int | None = None,
    implementation: str = "auto",
    mask_kind: str = "threshold",
) -> Core:
    """The core for these arguments of a model. In inference form it has the kind that the switch leaves.

    Raises:
      InputError: a name is unknown, the kernel's size is even, or the attention has no mask to fade.
    """
    check_known("attention", attention, KINDS)
    check_known("form", form, FORMS)
    check_implementation(implementation)
    check_known("mask_kind", mask_kind, MASK_KINDS)
    if token_conv is not None:
        check_known("token_conv", token_conv, TOKEN_KERNEL_SIZES)
    odd = token_kernel_size is None or token_kernel_size % 2
    check(odd, f"token_kernel_size must be odd, so that a tap stands on the token itself, not {token_kernel_size}.")
    kind = KINDS[attention]
    if mask_kind != "threshold" and not kind.takes("mask_kind"):
        raise InputError(f"mask_kind={mask_kind!r} is an option of castling attention, not of {attention!r}.")
    # From here on nothing asks for the form: in inference form the training kind is gone, with its branch.
    kind = kind.at_inference if form == "inference" else kind
    return Core(kind, token_conv, token_kernel_size, implementation, mask_kind)


def register_attention(
    name: str, function: Callable[..., Any], *, taps: bool = True, inference: str | None = None
) -> None:
    """Adds an attention of your own: afterwards `attention=name` works wherever an attention is named::

        def cosine_attention(q, k, v):
            q, k = (x / (1e-6 + jnp.linalg.norm(x, axis=-1, keepdims=True)) for x in (q, k))
            return jnp.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v) / k.shape[1]

        castling_jax.register_attention("cosine", cosine_attention)
        model = castling_jax.create_model("deit_tiny", attention="cosine")

    Register it in every process that makes a model with it: in a configuration file, or before `load_inference`. If you
    register a name twice, models that are made later have the second function.

    Args:
      name: a new name, written like a Python name. `count_costs` counts the function's work under it.
      function: (q, k, v) -> out, or (out, mask density) with the share of softmax weights that a mask keeps. q is
        [batch, queries, heads, key_dim], k [batch, keys, heads, key_dim], v [batch, keys, heads, value_dim] and out
        [batch, queries, heads, value_dim]; out is cast to v's dtype. The function is pure, and JAX can trace it. It may
        also take these inputs, by name: mask_threshold (a scalar, required if it has no default), mask_kind
        ("threshold" or "fade", from the model's arguments), bias (of the scores: LeViT's attention biases or MViTv2's
        relative positions, as in `ops.masked_softmax_attention`; None in DeiT), query_values (values at the queries'
        positions, where queries and keys are different tokens, as in `ops.linear_angular_attention`), grid (height and
        width of the queries), prefix_tokens (number of queries before the grid), kept (in masked pre-training the
        places on the grid [batch, patches] of the patches that are left, else None), around (an `ops.Around`: LeViT's
        batch norms of q, k and v, and its Hardswish; a function without this input gets arrays that are normalised),
        implementation, and token_kernel (the taps). A function that takes token_kernel applies the taps itself, and
        gets grid and prefix_tokens as `ops.depthwise_convolution` takes them.
      taps: whether the attention includes DWConv(V), the convolution of the values with a token kernel. It is added to
        the function's output, unless the function takes `token_kernel`.
      inference: the attention that replaces this one at the switch, registered before; None: the switch keeps this one.
        The switch drops the parameters for `bias` if the attention after it does not take `bias`.

    Raises:
      InputError: the name is built in or not written like a Python name, the function cannot be called as described, or
        `inference` is unknown, changes at the switch itself, or needs other parameters. A call of the attention raises
        it if the function's output has another shape.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"an attention's name must be written like a Python name, such as 'cosine', not {name!r}.")
    check(name not in BUILT_IN, f"the attention {name!r} is built in: choose another name.")
    _check_function(name, function)
    at_inference = None
    if inference is not None:
        check_known("attention", inference, [known for known in KINDS if known != name])
        at_inference = KINDS[inference]
        takes_bias = "bias" in inspect.signature(function).parameters
        for misfit, why in (
            (at_inference.inference, "changes at the switch itself"),
            (at_inference.taps != taps, f"has taps={at_inference.taps}, which the switch keeps"),
            (at_inference.takes("bias") and not takes_bias, f"takes a bias, which {name!r} does not take"),
            (at_inference.parameters or at_inference.module, f"has parameters of its own, which {name!r} lacks"),
        ):
            check(not misfit, f"inference={inference!r} {why}: name another attention.")

    # `wraps` also hands on the function's signature, from which `Kind` learns the inputs that it takes.
    @functools.wraps(function)
    def checked(q: Array, k: Array, v: Array, **inputs: Any) -> Output | Array:
        with jax.named_scope(name):
            result = function(q, k, v, **inputs)
        out, *density = result if isinstance(result, tuple) and result else (result,)
        expected = (*q.shape[:3], v.shape[3])
        if getattr(out, "shape", None) != expected or len(density) > 1:
            wanted = f"an array [batch, queries, heads, value_dim], here {expected}, or a pair of it and a mask density"
            raise InputError(f"the attention {name!r} must return {wanted}, not {_shape_of(result)}.")
        out = out.astype(v.dtype)
        return (out, jnp.asarray(density[0], jnp.float32)) if density else out

    KINDS[name] = Kind(name, checked, taps=taps, inference=at_inference, parts=(name,))


def _check_function(name: str, function: Any) -> None:
    """Raises an InputError unless `function` takes q, k and v, and its other required arguments are in INPUTS."""
    if not callable(function):
        raise InputError(f"the attention {name!r} must be a function of (q, k, v), not {function!r}.")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    check(len(positional) >= 3, f"the attention {name!r} must take (q, k, v), not {inspect.signature(function)}.")
    for parameter in parameters[3:]:
        is_one = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)  # not *args, not **kwargs
        if is_one and parameter.default is parameter.empty:
            check_known(f"input of the attention {name!r}", parameter.name, INPUTS)


def _shape_of(result: Any) -> str:
    shapes = [str(getattr(part, "shape", type(part).__name__)) for part in jax.tree.leaves(result)]
    return " and ".join(shapes) or type(result).__name__
