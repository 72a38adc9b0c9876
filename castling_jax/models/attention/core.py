"""A kind of attention, and the value that carries it from a model's constructor to its blocks."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from castling_jax import ops
from castling_jax.errors import InputError
from castling_jax.models.layers import Layers
from castling_jax.ops.activations import activate
from castling_jax.ops.around import NOTHING, normalize_qkv
from castling_jax.ops.tokens import values_of_queries

TOKEN_KERNEL_SIZES = {"1d": 9, "2d": 3}  # the authors' block has 9 taps over tokens
# The inputs beside q, k and v that a kind's function may take by name, with defaults: see `register_attention`.
INPUTS: dict[str, Any] = {
    "token_kernel": None,
    "mask_threshold": None,
    "mask_kind": "threshold",
    "bias": None,
    "query_values": None,
    "grid": None,
    "prefix_tokens": 0,
    "kept": None,
    "around": NOTHING,
    "implementation": "auto",
}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a plain transformer stand.

    Attributes:
      grid: (height, width) of the patches, in tokens.
      prefix_tokens: number of tokens before the patches, which have no place on the grid.
      kept: in masked pre-training the places of the patches that are left, counted row by row; None if all are there.
    """

    grid: tuple[int, int]
    prefix_tokens: int
    kept: Int[Array, "batch patches"] | None = None


Output = tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]  # and the mask density


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of attention. Its function gets the inputs that it has as arguments, by name.

    Attributes:
      name: the kind's name, a value of the argument `attention`.
      function: (q, k, v, ...) -> out, or (out, mask density), as `register_attention` describes it.
      taps: whether the values are convolved with a token kernel, where the model has a `token_conv`.
      linear: whether the cost grows with the number of tokens, not with its square.
      inference: the kind that replaces this one at the switch; None: the switch keeps this one.
      parts: the named scopes in which `count_costs` finds the work of the function.
      parameters: (attention module, layers) -> the kind's own parameters by name, in the sizes that the module's
        num_heads, key_dim and value_dim give. The function takes them under these names. None: no own parameters.
      block: an operation for a whole encoder block with this attention at inference, with the arguments and the result
        of `ops.linear_angular_block`. None: the block's layers run one after the other.
      module: a module that replaces `MultiHeadAttention` in plain transformers, and is made and called like it. It may
        call `function` or compute without it. None: MultiHeadAttention.
    """

    name: str
    function: Callable[..., Any]
    taps: bool = True
    linear: bool = False
    inference: "Kind | None" = None
    parts: tuple[str, ...] = ()
    parameters: Callable[[Any, Layers], dict[str, nnx.Param]] | None = None
    block: Callable[..., Array] | None = None
    module: Callable[..., Any] | None = None

    @functools.cached_property
    def signature(self) -> dict[str, inspect.Parameter]:
        """The function's parameters after q, k and v, by name."""
        # Cached, because every block reads it several times whenever a model is traced.
        return dict(list(inspect.signature(self.function).parameters.items())[3:])

    def takes(self, name: str) -> bool:
        """Whether the function takes the input `name`."""
        return name in self.signature

    @property
    def at_inference(self) -> "Kind":
        """The kind after the switch."""
        return self.inference or self

    @property
    def tables(self) -> Literal["module", "softmax_branch"] | None:
        """Where an attention module keeps the parameters that serve only the bias of the scores.

        These parameters are LeViT's attention biases and MViTv2's relative positions. They are in the attention module
        itself, in its `softmax_branch`, which the switch drops, or nowhere (None).
        """
        if not self.takes("bias"):
            return None
        # The switch drops the whole branch by its name, so nothing that the inference form reads may be in it.
        return "module" if self.at_inference.takes("bias") else "softmax_branch"

    def __call__(self, q: Array, k: Array, v: Array, **inputs: Any) -> Output:
        """The output after DWConv(V) and the activation, and the mask density, which is 0 for a kind without a mask.

        q, k and v are normalised by the norms in `around` first. `inputs` are some of INPUTS, and all of the kind's own
        parameters. The function gets the inputs that it takes.

        Raises:
          InputError: the function needs a mask threshold, and mask_threshold is None.
        """
        inputs = INPUTS | inputs
        threshold = self.signature.get("mask_threshold")
        if threshold and threshold.default is threshold.empty and inputs["mask_threshold"] is None:
            raise InputError(f"a {self.name} model in training form needs mask_threshold, a number of at least 0.")
        density = jnp.zeros((), jnp.float32)
        token_kernel, apart = inputs["token_kernel"], False
        where = where_taps_stand(token_kernel, inputs["grid"], inputs["prefix_tokens"])
        kept = inputs["kept"] if where["grid"] else None  # taps over the tokens read those that are left, as they come
        if self.takes("token_kernel") and kept is None:
            # The function adds DWConv(V) itself, as castling's kernels do in one pass over the values.
            inputs |= where
        elif token_kernel is not None:
            inputs["token_kernel"] = None
            apart = True
        norms, activation = inputs["around"]
        # Only a function that returns the whole output, convolved values included, can apply the activation itself.
        if self.takes("around") and not apart:
            norms = activation = None
        else:
            inputs["around"] = NOTHING
        q, k, v = normalize_qkv(q, k, v, norms)
        out = self.function(q, k, v, **{name: value for name, value in inputs.items() if self.takes(name)})
        if isinstance(out, tuple):
            out, density = out
        if apart:
            values = values_of_queries(v, inputs["query_values"])
            out = out + _convolve(values, token_kernel, kept, **where)
        if activation is not None:
            # With heads as an axis of its own, XLA:TPU would not compute it together with the projection that follows.
            out = activate(out.reshape(*out.shape[:2], -1), activation).reshape(out.shape)
        return out, density


def where_taps_stand(token_kernel: Any, grid: tuple[int, int] | None, prefix_tokens: int) -> dict[str, Any]:
    """The arguments `grid` and `prefix_tokens` of an operation with this token kernel, or without one (None).

    A kernel over the tokens runs through prefix and patches alike: it takes no grid.
    """
    if token_kernel is None or token_kernel.ndim != 3:
        return {"grid": None, "prefix_tokens": 0}
    return {"grid": grid, "prefix_tokens": prefix_tokens}


def _convolve(
    v: Array, token_kernel: Array, kept: Array | None, *, grid: tuple[int, int] | None, prefix_tokens: int
) -> Array:
    """DWConv(V). Patches that are not kept, as in masked pre-training, count as zeros."""
    if kept is None:
        return ops.depthwise_convolution(v, token_kernel, grid=grid, prefix_tokens=prefix_tokens)
    assert grid is not None  # only a kernel over the grid needs the patches in their places
    places = jnp.concatenate([jnp.arange(prefix_tokens) + jnp.zeros_like(kept[:, :1]), prefix_tokens + kept], axis=1)
    whole = jnp.zeros((v.shape[0], prefix_tokens + grid[0] * grid[1], *v.shape[2:]), v.dtype)
    scatter = jax.vmap(lambda whole, places, v: whole.at[places].set(v, unique_indices=True))
    convolved = ops.depthwise_convolution(
        scatter(whole, places, v), token_kernel, grid=grid, prefix_tokens=prefix_tokens
    )
    return jnp.take_along_axis(convolved, places[:, :, None, None], axis=1)


@dataclasses.dataclass(frozen=True)
class Core:
    """The attention that a model is built with: one value from the model's constructor down to its blocks.

    Attributes:
      kind: the kind of attention; in inference form the kind after the switch.
      token_conv: the convolution of the values: "1d" over tokens, "2d" over the grid, or None.
      token_kernel_size: taps, or rows and columns, of that convolution; None is 9 for "1d" and 3 for "2d".
      implementation: "auto", "xla" or "pallas", as in `ops`.
      mask_kind: how the threshold empties castling's softmax branch: "threshold" or "fade", as in `ops`.
      window_size: side of the windows of attention="window", in tokens; None is 7.
      pools_qkv: whether multi-head attention pools its queries, keys and values.
      block: number of the block in its model, from 0. Only plain transformers set it.
    """

    kind: Kind
    token_conv: str | None
    token_kernel_size: int | None = None
    implementation: str = "auto"
    mask_kind: str = "threshold"
    window_size: int | None = None
    pools_qkv: bool = False
    block: int = 0

    @property
    def needs_query_values(self) -> bool:
        """Whether the function or the token kernel reads the values at the queries' positions."""
        return self.kind.takes("query_values") or (self.kind.taps and self.token_conv is not None)

    def add_parameters(self, module: Any, layers: Layers, **tables: nnx.Param) -> None:
        """Gives an attention module its token kernel, its tables and the kind's own parameters.

        Args:
          module: the attention module; its `num_heads`, `key_dim` and `value_dim` are set.
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
        """The holder of the module's parameters for a bias of the scores: the module, its branch, or None."""
        return module if self.kind.tables == "module" else module.softmax_branch

    def inputs_of(self, module: Any) -> dict[str, Any]:
        """The kind's inputs that do not depend on the images: the module's parameters, and options of this core."""
        # An argument that is not in INPUTS is one of the kind's own parameters, because `Kind.parameters` names it.
        own = self.kind.signature.keys() - INPUTS.keys() if self.kind.parameters else ()
        token_kernel = None if module.token_kernel is None else module.token_kernel[...]
        return {
            "token_kernel": token_kernel,
            "implementation": self.implementation,
            "mask_kind": self.mask_kind,
            **{name: getattr(module, name)[...] for name in own},
        }
