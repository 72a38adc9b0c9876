"""Attention maps: how much each query of a layer takes from each key.

If an attention is linear in its values, one-hot values reveal its weights: with the unit vector e_j as the value of key
j, the output at query i is query i's row of weights. So the maps come from the attentions' own functions, not from a
second copy of their formulas.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from castling_jax import ops
from castling_jax.errors import InputError, takes
from castling_jax.models.attention.core import Kind
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.model import Model
from castling_jax.models.variables import MODEL, VARIABLES, Variables, bind, check_images
from castling_jax.ops.angular import linear_angular_core
from castling_jax.ops.around import NOTHING, normalize_qkv
from castling_jax.ops.castling import softmax_branch
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.tokens import values_of_queries

Weights = dict[str, Float[Array, "batch heads queries keys"]]


def _masked_softmax(q, k, v, *, mask_threshold, mask_kind, bias):
    branch = softmax_branch(
        q, k, v, mask_threshold=mask_threshold, mask_kind=mask_kind, bias=bias, implementation="xla"
    )
    return branch[0]


_ANGULAR = Kind("angular", ops.angular_attention)  # without the normalisation that KINDS["angular"] adds
_LINEAR_ANGULAR = Kind("linear_angular", linear_angular_core)
# Attention -> the terms that it sums, each linear in the values. An attention that is not listed has one term: itself.
_TERMS = {
    "castling": (Kind("masked_softmax", _masked_softmax), _LINEAR_ANGULAR, _ANGULAR),
    "linear_angular": (_LINEAR_ANGULAR, _ANGULAR),
    "angular": (_ANGULAR,),
    "softmax_taps": (KINDS["softmax"],),
    "convolutional": (KINDS["softmax"],),
}


@takes(model=MODEL, variables=VARIABLES)
def attention_maps(
    model: Model,
    variables: Variables,
    images: Float[Array, "batch height width channels"],
    *,
    layer: int,
    mask_threshold: ArrayLike | None = None,
) -> Weights:
    """The weights that an attention layer gives its values, by the name of the term; pure and jit-able.

    Args:
      model: the architecture; its own parameters are not used.
      variables: the variables to use, as `get_variables` returns them.
      images: normalised pixels, as `apply` takes them.
      layer: index among all attention layers in the order of the model, LeViT's subsampling layers included; a negative
        index counts from the last layer. A masked autoencoder's decoder, whose kind is softmax, has the last layers.
      mask_threshold: as in `apply`.

    Returns:
      Arrays [batch, heads, queries, keys], in float32 at least. DeiT's class and distillation tokens come first, then
      the patches row by row. The names are

      "masked_softmax": M * P of a castling layer, P = softmax(Q K^T / sqrt(key_dim) + bias) (equation 9); with
        mask_kind="fade", (1 - mask_threshold) P.
      "linear_angular": 1/2 I + Q^ K^^T / pi of castling and linear_angular, before the output normalisation
        (equation 7). The kernel has 1/2 for every key, but the paper writes 1/2 V, so each query has its 1/2 only at
        the key in its own position. Where MViTv2 pools queries and keys with different strides, the 1/2 V term reads
        values that belong to no key, and the weights are Q^ K^^T / pi.
      "angular": the exact kernel 1 - theta / pi (equations 3 and 4) of castling, linear_angular and angular. Castling
        and linear_angular do not compute it: it shows what their terms leave out.
      "softmax": P of softmax, softmax_taps and convolutional. The keys of convolutional are the class token and a
        quarter of the patches.

      Every other attention has one entry under its own name; taylor's weights are the sum over its branch and its
      linear part. An attention that `register_attention` added is assumed to be linear in its values. Taps are left
      out.

    Raises:
      InputError: what `apply` raises; the model has no such layer; or the layer's attention does not weigh all keys for
        each query (window, bridge, separable).
    """
    check_images(images)
    attentions = _attentions(model)
    if not isinstance(layer, int | np.integer) or not -len(attentions) <= layer < len(attentions):
        raise InputError(f"layer must be an integer from {-len(attentions)} to {len(attentions) - 1}, not {layer!r}.")

    @on_auto_axes(lambda images: split_as(images, 0))
    def forward(images: Any, variables: Any, mask_threshold: Any) -> Weights:
        calls: list[Any] = []
        bound = bind(model, variables)
        for attention in _attentions(bound):
            kind = attention.core.kind
            # Without the operation for a whole block, which would not call the attention.
            recorder = _Recorder(**_fields(kind) | {"block": None}, recorded=kind, calls=calls)
            attention.core = dataclasses.replace(attention.core, kind=recorder)
        for _, module in nnx.iter_modules(bound):
            if hasattr(module, "remat"):
                module.remat = False  # nnx.remat traces a block by itself, and its tracers must not leak into `calls`
        bound(images, mask_threshold=mask_threshold)
        # window, bridge and separable call `kind.function` themselves, past the recorder.
        if not calls:
            name = attentions[0].core.kind.name
            raise InputError(f"attention={name!r} has no maps, because it does not weigh all keys for each query.")
        return _weights(*calls[layer])

    return forward(images, variables, mask_threshold)


def _attentions(model: Model) -> list[Any]:
    """The modules that have a core, in no particular order."""
    return [module for _, module in nnx.iter_modules(model) if hasattr(module, "core")]


def _fields(kind: Kind) -> dict[str, Any]:
    return {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorder(Kind):
    """A kind that also appends itself as it was, `recorded`, and the inputs of each call to `calls`.

    Layers are called in the order of the model. A masked autoencoder's decoder has another kind than its backbone.
    """

    recorded: Kind
    calls: list[tuple[Kind, Array, Array, dict[str, Any]]]

    def __call__(self, q: Array, k: Array, v: Array, **inputs: Any) -> Any:
        normal_q, normal_k, _ = normalize_qkv(q, k, v, inputs.get("around", NOTHING).norms)
        self.calls.append((self.recorded, normal_q, normal_k, inputs))
        return super().__call__(q, k, v, **inputs)


def _weights(
    kind: Kind,
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    inputs: dict[str, Any],
) -> Weights:
    """The outputs of the kind's terms for one-hot values."""
    # A bfloat16 map would have 8 bits; float64 stays as it is.
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, bias = jax.tree.map(lambda x: x.astype(wide), (q, k, inputs.get("bias")))
    (batch, keys, heads, _), queries = k.shape, q.shape[1]
    one_hot = jnp.broadcast_to(jnp.eye(keys, dtype=wide)[:, None], (batch, keys, heads, keys))
    place = inputs.get("query_values")
    if isinstance(place, jax.Array):  # the queries have values of their own, which belong to no key
        query_values = jnp.zeros((batch, queries, heads, keys), wide)
    else:
        query_values = values_of_queries(one_hot, place)
    inputs = inputs | {"bias": bias, "query_values": query_values, "implementation": "xla"}
    # Taps mix the values of neighbouring tokens, and are no weight between a query and a key; with an activation the
    # output is not linear in the values.
    inputs |= {"token_kernel": None, "around": NOTHING}
    outputs = {term.name: term(q, k, one_hot, **inputs)[0] for term in _TERMS.get(kind.name, (kind,))}
    return {name: jnp.swapaxes(out, 1, 2) for name, out in outputs.items()}
