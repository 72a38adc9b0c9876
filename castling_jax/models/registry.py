"""Names -> models."""

import inspect
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, cast, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention import ATTENTIONS, FORMS
from castling_jax.models.backbone import Backbone, ModelSpec
from castling_jax.models.deit import DeiT
from castling_jax.models.levit import LeViT
from castling_jax.models.mvitv2 import MViTv2
from castling_jax.ops.checks import check_implementation


def _levit(embed_dim: tuple[int, ...], depth: tuple[int, ...], num_heads: tuple[int, ...], key_dim: int) -> dict:
    return {"image_size": 224, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "key_dim": key_dim}


# name -> (class, its arguments): DeiT's are Touvron et al.'s, table 1, LeViT's Graham et al.'s, table 1, MViTv2's Li et
# al.'s, with their drop-path. deit_micro is ours, for small images on a CPU; DeiT's start of 0.02 is too small for its
# width to learn from.
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "deit_tiny": (DeiT, {"image_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 3}),
    "deit_small": (DeiT, {"image_size": 224, "embed_dim": 384, "depth": 12, "num_heads": 6}),
    "deit_base": (DeiT, {"image_size": 224, "embed_dim": 768, "depth": 12, "num_heads": 12}),
    "deit_micro": (
        DeiT,
        {"image_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 2, "init_std": 0.1},
    ),
    "levit_128s": (LeViT, _levit((128, 256, 384), (2, 3, 4), (4, 6, 8), 16)),
    "levit_128": (LeViT, _levit((128, 256, 384), (4, 4, 4), (4, 8, 12), 16)),
    "levit_192": (LeViT, _levit((192, 288, 384), (4, 4, 4), (3, 5, 6), 32)),
    "levit_256": (LeViT, _levit((256, 384, 512), (4, 4, 4), (4, 6, 8), 32)),
    "levit_384": (LeViT, _levit((384, 512, 768), (4, 4, 4), (6, 9, 12), 32) | {"drop_path_rate": 0.1}),
    "mvitv2_tiny": (MViTv2, {"image_size": 224, "depths": (1, 2, 5, 2), "drop_path_rate": 0.1}),
    "mvitv2_small": (MViTv2, {"image_size": 224, "depths": (1, 2, 11, 2), "drop_path_rate": 0.1}),
    "mvitv2_base": (MViTv2, {"image_size": 224, "depths": (2, 3, 16, 3), "drop_path_rate": 0.3}),
}
DTYPES = ("float32", "bfloat16")
COMMON_ARGUMENTS = ("self", "attention", "form", "num_classes", "image_size", "dtype", "param_dtype", "rngs")


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _check_types(arguments: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raises an InputError unless arguments are what a constructor's annotations say, and sizes at least 1.

    What is to be a tuple may be an integer here, for the constructor to say how long it should be.
    """
    for word, value in arguments.items():
        hint = parameters[word].annotation
        kinds = {get_origin(kind) or kind for kind in (hint.__args__ if isinstance(hint, UnionType) else (hint,))}
        if tuple in kinds:
            if any(type(item) is not int for item in jax.tree.leaves(value)):
                raise InputError(f"{word} must be integers, not {value!r}.")
            continue
        if float in kinds:
            kinds |= {int}
        if type(value) not in kinds:
            allowed = " or ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in kinds))
            raise InputError(f"{word} must be {allowed.replace('NoneType', 'None')}, not {value!r}.")
        if type(value) is int and value < 1 and float not in kinds:
            raise InputError(f"{word} must be at least 1, not {value}.")


def _plain(value: Any) -> Any:
    """Tuples in the place of lists, which JSON has: they can be hashed, as a spec must be. And Python's integers."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return int(value) if isinstance(value, np.integer) else value


def create_model(
    name: str,
    *,
    attention: str = "castling",
    form: str = "train",
    num_classes: int = 1000,
    image_size: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds a backbone with fresh parameters.

    Args:
      name: one of MODELS.
      attention: "castling", "linear_angular", "softmax", or "angular" (the exact kernel, quadratic in tokens).
      form: "train" or "inference"; a castling model in inference form has no softmax branch.
      num_classes: logits.
      image_size: pixels a side; None is the model's own.
      dtype: what it computes in, float32 or bfloat16; logits are float32 always.
      param_dtype: what its parameters are held in.
      rngs: where the parameters are drawn from; None is nnx.Rngs(0).
      **overrides: timm's constructor words: embed_dim, depth, num_heads (tuples of LeViT), depths, stride_q,
        stride_kv_adaptive (of MViTv2), key_dim, patch_size, in_chans, mlp_ratio, qkv_bias, distilled, drop_path_rate;
        init_std of the matrices; remat, to compute what is inside a block again in the backward pass rather than keep
        it; token_conv ("1d", "2d" or None) and token_kernel_size; and implementation, of the operations ("auto", "xla"
        or "pallas").

    Returns:
      A Flax NNX module; `model.spec` holds what it was made from.

    Raises:
      InputError: a name or an override is unknown, or sizes do not fit each other.
    """
    check_known("model", name, MODELS)
    check_known("attention", attention, ATTENTIONS)
    check_known("form", form, FORMS)
    dtypes = {"dtype": _dtype_name(dtype), "param_dtype": _dtype_name(param_dtype)}
    for word, given in dtypes.items():
        check_known(word, given, DTYPES)
    factory, defaults = MODELS[name]
    parameters = inspect.signature(factory.__init__).parameters
    for word in overrides:
        check_known(f"argument of {name}", word, [word for word in parameters if word not in COMMON_ARGUMENTS])
    check_implementation(overrides.get("implementation", "auto"))
    if not isinstance(rngs, nnx.Rngs | _SameKey | None):
        raise InputError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), not {type(rngs).__name__}.")
    if rngs is not None and not hasattr(rngs, "params"):
        raise InputError("rngs must have a stream for params, as nnx.Rngs(0) and nnx.Rngs(params=0) do.")
    overrides = {word: _plain(value) for word, value in overrides.items()}
    arguments: dict[str, Any] = defaults | overrides
    if image_size is not None:
        arguments["image_size"] = image_size
    _check_types(arguments | {"num_classes": num_classes}, parameters)
    if not 0 <= (rate := arguments.get("drop_path_rate", 0)) < 1:
        raise InputError(f"drop_path_rate must be in [0, 1), not {rate}.")
    if not 0 < (ratio := arguments.get("mlp_ratio", 1)) < math.inf:
        raise InputError(f"mlp_ratio must be above 0, not {ratio}.")
    model = factory(
        attention=attention,
        form=form,
        num_classes=num_classes,
        dtype=jnp.dtype(dtypes["dtype"]),
        param_dtype=jnp.dtype(dtypes["param_dtype"]),
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **arguments,
    )
    model.spec = ModelSpec(
        name=name,
        attention=attention,
        form=form,
        num_classes=num_classes,
        image_size=arguments["image_size"],
        **dtypes,
        overrides=tuple(sorted(overrides.items())),
    )
    return model


class _SameKey:
    """In the place of nnx.Rngs where nothing is drawn: counting the draws is most of what tracing a model costs."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract_model(name: str, **arguments: Any) -> Backbone:
    """`create_model` with shapes in the place of arrays: nothing is allocated or drawn."""
    return nnx.eval_shape(lambda: create_model(name, **({"rngs": cast(nnx.Rngs, _SameKey())} | arguments)))
