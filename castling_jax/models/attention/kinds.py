"""The table of attention kinds: what happens between the projections, from q, k and v to the output.

A backbone makes q, k and v in its own way (one fused layer, pooled on a grid, every second token), and each backbone
takes every kind. A new kind is an entry of KINDS; everything else, from `create_model` to the switch, reads it there.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from castling_jax import ops
from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.bridge import BridgeAttention
from castling_jax.models.attention.convolutional import ConvolutionalAttention
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
from castling_jax.models.layers import Layers
from castling_jax.ops.angular import normalize_and_convolve
from castling_jax.ops.bias import Bias, dense_bias
from castling_jax.ops.castling import MASK_KINDS
from castling_jax.ops.checks import check_implementation
from castling_jax.ops.tokens import values_of_queries

FORMS = ("train", "inference")
TOKEN_KERNEL_SIZES = {"1d": 9, "2d": 3}  # the authors' block has 9 taps over tokens
# What a kind's function may take by name beside q, k and v, with its default: see `register_attention`.
INPUTS: dict[str, Any] = {
    "token_kernel": None,
    "mask_threshold": None,
    "mask_kind": "threshold",
    "bias": None,
    "query_values": None,
    "grid": None,
    "prefix_tokens": 0,
    "implementation": "auto",
}

Output = tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]  # with the mask density


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of attention. What its function takes by name says what it needs.

    Attributes:
      name: what `attention` calls it.
      function: (q, k, v, ...) -> out, or (out, mask density), as `register_attention` describes it.
      taps: whether the values are convolved with a token kernel, where the model has a `token_conv`.
      linear: whether the cost grows with the number of tokens, not with its square.
      inference: the kind that it becomes at the switch; None: it stays as it is.
      parts: the named scopes in which `count_costs` finds the work of the function.
      parameters: (attention module, layers) -> parameters of the kind's own, by name, for the module's num_heads,
        key_dim and value_dim; the function takes them by these names. None: it has none.
      module: a module in the place of `MultiHeadAttention`, made and called like it, which may use `function` or not;
        for plain transformers only. None: MultiHeadAttention.
    """

    name: str
    function: Callable[..., Any]
    taps: bool = True
    linear: bool = False
    inference: "Kind | None" = None
    parts: tuple[str, ...] = ()
    parameters: Callable[[Any, Layers], dict[str, nnx.Param]] | None = None
    module: Callable[..., Any] | None = None

    @functools.cached_property
    def signature(self) -> dict[str, inspect.Parameter]:
        """What the function takes beside q, k and v, by name."""
        return dict(list(inspect.signature(self.function).parameters.items())[3:])

    def takes(self, name: str) -> bool:
        """Whether the function takes this input."""
        return name in self.signature

    @property
    def at_inference(self) -> "Kind":
        """The kind that is left after the switch."""
        return self.inference or self

    @property
    def tables(self) -> Literal["module", "softmax_branch"] | None:
        """Where the parameters live that only a bias of the scores is made of.

        These are LeViT's attention biases and MViTv2's relative positions. They are in the attention module itself, or
        in its `softmax_branch`, which the switch drops, or nowhere.
        """
        if not self.takes("bias"):
            return None
        return "module" if self.at_inference.takes("bias") else "softmax_branch"

    def __call__(self, q: Array, k: Array, v: Array, **inputs: Any) -> Output:
        """The output, convolved values included, and the mask density, which is 0 for a kind that has no mask.

        `inputs` are some of INPUTS, and all of the kind's own parameters; the function gets those that it takes.

        Raises:
          InputError: the function needs a mask threshold, and there is none.
        """
        inputs = INPUTS | inputs
        threshold = self.signature.get("mask_threshold")
        if threshold and threshold.default is threshold.empty and inputs["mask_threshold"] is None:
            raise InputError(f"a {self.name} model in training form needs mask_threshold, a number of at least 0.")
        density = jnp.zeros((), jnp.float32)
        token_kernel, values = inputs["token_kernel"], None
        # A kernel over the tokens runs through prefix and patches alike: it takes no grid.
        on_grid = token_kernel is not None and token_kernel.ndim == 3
        where = {name: inputs[name] if on_grid else INPUTS[name] for name in ("grid", "prefix_tokens")}
        if self.takes("token_kernel"):
            inputs |= where
        elif token_kernel is not None:
            values = values_of_queries(v, inputs["query_values"])
        out = self.function(q, k, v, **{name: value for name, value in inputs.items() if self.takes(name)})
        if isinstance(out, tuple):
            out, density = out
        if values is not None:
            out = out + ops.depthwise_convolution(values, token_kernel, **where)
        return out, density


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
    # JAX's own only takes values as wide as the keys; LeViT's are two and four times as wide.
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[3])
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def normalized_angular_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
) -> Float[Array, "batch queries heads value_dim"]:
    """l2normalise(Sim(Q, K) V): the exact kernel in the place of linear-angular attention's first two terms."""
    out = ops.angular_attention(q, k, v)
    return normalize_and_convolve(out, out, None, grid=None, prefix_tokens=0)


_LINEAR_ANGULAR = Kind("linear_angular", ops.linear_angular_attention, linear=True, parts=("linear_angular",))
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
_BUILT_IN = frozenset(KINDS)


@dataclasses.dataclass(frozen=True)
class Core:
    """The attention that a model is built with: one value from the model's constructor down to its blocks.

    Attributes:
      kind: the kind of attention; in inference form the one that is left after the switch.
      token_conv: the convolution of the values: "1d" over tokens, "2d" over the grid, or None.
      token_kernel_size: taps, or rows and columns, of that convolution; None is 9 for "1d" and 3 for "2d".
      implementation: "auto", "xla" or "pallas", as in `ops`.
      mask_kind: how the threshold empties castling's softmax branch: "threshold" or "fade", as in `ops`.
      window_size: side of the windows of attention="window", in tokens; None is 7.
      block: the number of the block in its model, from 0; a plain transformer sets it.
    """

    kind: Kind
    token_conv: str | None
    token_kernel_size: int | None = None
    implementation: str = "auto"
    mask_kind: str = "threshold"
    window_size: int | None = None
    block: int = 0

    @property
    def needs_query_values(self) -> bool:
        """Whether anything reads the values at the queries' positions."""
        return self.kind.takes("query_values") or (self.kind.taps and self.token_conv is not None)

    def add_parameters(self, module: Any, layers: Layers, **tables: nnx.Param) -> None:
        """Gives an attention module its token kernel, its tables and the kind's own parameters.

        Args:
          module: has `num_heads`, and the widths of each head, `key_dim` and `value_dim`.
          layers: makes the parameters.
          **tables: the backbone's parameters for a bias of the scores. They go where `Kind.tables` says.
        """
        kind = self.kind
        taps = self._taps if kind.taps else None
        # Taps start at zero, so that a new model starts as attention alone.
        module.token_kernel = None if taps is None else layers.zeros(*taps, module.num_heads)
        module.softmax_branch = nnx.Dict(**tables) if kind.tables == "softmax_branch" else None
        parameters = kind.parameters(module, layers) if kind.parameters else {}
        if kind.tables == "module":
            parameters |= tables
        for name, parameter in parameters.items():
            setattr(module, name, parameter)

    @property
    def _taps(self) -> tuple[int, ...] | None:
        """The token kernel's shape without its heads."""
        if self.token_conv is None:
            return None
        size = self.token_kernel_size or TOKEN_KERNEL_SIZES[self.token_conv]
        return (size,) if self.token_conv == "1d" else (size, size)

    def tables_of(self, module: Any) -> Any:
        """What holds the module's parameters for a bias of the scores: the module, its branch, or None."""
        return module if self.kind.tables == "module" else module.softmax_branch

    def inputs_of(self, module: Any) -> dict[str, Any]:
        """What the kind reads beside q, k and v and the place of the tokens: its parameters, and how to run."""
        own = self.kind.signature.keys() - INPUTS.keys() if self.kind.parameters else ()
        token_kernel = None if module.token_kernel is None else module.token_kernel[...]
        return {
            "token_kernel": token_kernel,
            "implementation": self.implementation,
            "mask_kind": self.mask_kind,
            **{name: getattr(module, name)[...] for name in own},
        }


def make_core(
    attention: str,
    form: str,
    *,
    token_conv: str | None,
    token_kernel_size: int | None = None,
    implementation: str = "auto",
    mask_kind: str = "threshold",
) -> Core:
    """The core that a model's arguments name; in inference form that of the kind which is left after the switch.

    Raises:
      InputError: a name is unknown, the kernel's size is even, or the attention has no branch that fades.
    """
    check_known("attention", attention, KINDS)
    check_known("form", form, FORMS)
    check_implementation(implementation)
    check_known("mask_kind", mask_kind, MASK_KINDS)
    if token_conv is not None:
        check_known("token_conv", token_conv, TOKEN_KERNEL_SIZES)
    if token_kernel_size is not None and token_kernel_size % 2 == 0:
        raise InputError(
            f"token_kernel_size must be odd, so that a tap stands on the token itself, not {token_kernel_size}."
        )
    kind = KINDS[attention]
    if mask_kind != "threshold" and not kind.takes("mask_kind"):
        raise InputError(f"mask_kind={mask_kind!r} is an option of castling attention, not of {attention!r}.")
    kind = kind.at_inference if form == "inference" else kind
    return Core(kind, token_conv, token_kernel_size, implementation, mask_kind)


def register_attention(
    name: str, function: Callable[..., Any], *, taps: bool = True, inference: str | None = None
) -> None:
    """Adds an attention of your own: afterwards `attention=name` works wherever an attention is named.

        def cosine_attention(q, k, v):
            q, k = (x / (1e-6 + jnp.linalg.norm(x, axis=-1, keepdims=True)) for x in (q, k))
            return jnp.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v) / k.shape[1]

        castling_jax.register_attention("cosine", cosine_attention)
        model = castling_jax.create_model("deit_tiny", attention="cosine")

    Register it in every process that makes a model with it: in a configuration file, or before `load_inference`. A name
    that you registered before is replaced in the models that are made from then on.

    Args:
      name: a new name, written like a Python name. `count_costs` counts the function's work under it.
      function: (q, k, v) -> out, or (out, mask density) with the share of softmax weights kept. q is [batch, queries,
        heads, key_dim], k [batch, keys, heads, key_dim], v [batch, keys, heads, value_dim] and out [batch, queries,
        heads, value_dim]; out is cast to v's dtype. Pure and traceable by JAX. It may also take these, by name:
        mask_threshold (scalar, required if it has no default), mask_kind ("threshold" or "fade", as the model is built
        with), bias (of the scores: LeViT's attention biases, MViTv2's relative positions, as in
        `ops.masked_softmax_attention`; None in DeiT), query_values (values at the queries' positions, where queries and
        keys are different tokens, as in `ops.linear_angular_attention`), grid (height, width of the queries),
        prefix_tokens (queries before the grid), implementation, and token_kernel (the taps, which it then applies
        itself; grid and prefix_tokens are then as `ops.depthwise_convolution` takes them).
      taps: whether DWConv(V), the convolution of the values with a token kernel, is part of it: it is added to the
        function's output, unless the function takes `token_kernel`.
      inference: the attention that it becomes at the switch, registered before; None: it stays as it is. Parameters for
        `bias` are dropped at the switch if that one does not take `bias`.

    Raises:
      InputError: the name is built in or no name, the function cannot be called so, or `inference` is unknown, changes
        at the switch itself, or needs other parameters. Later, where the function is called: its output has another
        shape.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"an attention's name must be written like a Python name, such as 'cosine', not {name!r}.")
    if name in _BUILT_IN:
        raise InputError(f"the attention {name!r} is built in: choose another name.")
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
            if misfit:
                raise InputError(f"inference={inference!r} {why}: name another attention.")

    @functools.wraps(function)
    def checked(q: Array, k: Array, v: Array, **inputs: Any) -> Output | Array:
        with jax.named_scope(name):
            result = function(q, k, v, **inputs)
        out, *density = result if isinstance(result, tuple) and result else (result,)
        expected = (*q.shape[:3], v.shape[3])
        if getattr(out, "shape", None) != expected or len(density) > 1:
            raise InputError(
                f"the attention {name!r} must return an array [batch, queries, heads, value_dim], here of shape "
                f"{expected}, or a pair of it and the mask density, not {_shape_of(result)}."
            )
        out = out.astype(v.dtype)
        return (out, jnp.asarray(density[0], jnp.float32)) if density else out

    KINDS[name] = Kind(name, checked, taps=taps, inference=at_inference, parts=(name,))


def _check_function(name: str, function: Any) -> None:
    """Raises an InputError unless `function` takes q, k and v, and beside them nothing that nobody gives it."""
    if not callable(function):
        raise InputError(f"the attention {name!r} must be a function of (q, k, v), not {function!r}.")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 3:
        raise InputError(f"the attention {name!r} must take (q, k, v), not {inspect.signature(function)}.")
    for parameter in parameters[3:]:
        if parameter.name in INPUTS or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            check_known(f"input of the attention {name!r}", parameter.name, INPUTS)


def _shape_of(result: Any) -> str:
    shapes = [str(getattr(part, "shape", type(part).__name__)) for part in jax.tree.leaves(result)]
    return " and ".join(shapes) or type(result).__name__
