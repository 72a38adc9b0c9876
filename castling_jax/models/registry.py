"""Names -> models."""

import dataclasses
from types import UnionType
from typing import Any, cast, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.errors import InputError, check_at_least, check_at_most, check_known
from castling_jax.models.attention.kinds import KINDS, make_core
from castling_jax.models.backbone import Backbone, BackboneConfig, ModelSpec
from castling_jax.models.deit import DeiT, DeiTConfig
from castling_jax.models.layers import Layers
from castling_jax.models.levit import LeViT, LeViTConfig
from castling_jax.models.mvitv2 import MViTv2, MViTv2Config

# name -> (class, its configuration): DeiT's are Touvron et al.'s, table 1, LeViT's Graham et al.'s, table 1, MViTv2's
# Li et al.'s, with their drop-path. deit_micro is ours, for small images on a CPU; it is so narrow that it does not
# learn from DeiT's initial deviation of 0.02.
MODELS: dict[str, tuple[type[Backbone], BackboneConfig]] = {
    "deit_tiny": (DeiT, DeiTConfig(embed_dim=192, depth=12, num_heads=3)),
    "deit_small": (DeiT, DeiTConfig(embed_dim=384, depth=12, num_heads=6)),
    "deit_base": (DeiT, DeiTConfig(embed_dim=768, depth=12, num_heads=12)),
    "deit_micro": (DeiT, DeiTConfig(image_size=8, patch_size=2, embed_dim=64, depth=4, num_heads=2, init_std=0.1)),
    "levit_128s": (
        LeViT,
        LeViTConfig(embed_dim=(128, 256, 384), depth=(2, 3, 4), num_heads=(4, 6, 8), key_dim=16),
    ),
    "levit_128": (
        LeViT,
        LeViTConfig(embed_dim=(128, 256, 384), depth=(4, 4, 4), num_heads=(4, 8, 12), key_dim=16),
    ),
    "levit_192": (
        LeViT,
        LeViTConfig(embed_dim=(192, 288, 384), depth=(4, 4, 4), num_heads=(3, 5, 6), key_dim=32),
    ),
    "levit_256": (
        LeViT,
        LeViTConfig(embed_dim=(256, 384, 512), depth=(4, 4, 4), num_heads=(4, 6, 8), key_dim=32),
    ),
    "levit_384": (
        LeViT,
        LeViTConfig(embed_dim=(384, 512, 768), depth=(4, 4, 4), num_heads=(6, 9, 12), key_dim=32, drop_path_rate=0.1),
    ),
    "mvitv2_tiny": (MViTv2, MViTv2Config(depths=(1, 2, 5, 2), drop_path_rate=0.1)),
    "mvitv2_small": (MViTv2, MViTv2Config(depths=(1, 2, 11, 2), drop_path_rate=0.1)),
    "mvitv2_base": (MViTv2, MViTv2Config(depths=(2, 3, 16, 3), drop_path_rate=0.3)),
}
DTYPES = ("float32", "bfloat16")
ARGUMENTS = ("attention", "form", "dtype", "param_dtype", "rngs")  # of create_model, beside a configuration's fields
MOST_BLOCKS, LARGEST_SIZE = 256, 2**24  # above any model; what a file says beyond that takes minutes to be refused


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _check_values(config: BackboneConfig) -> None:
    """Raises an InputError unless fields are of the types they are annotated with, sizes at least 1, and shares valid.

    A field for a tuple may be an integer here: the model's constructor says how long the tuple has to be.
    """
    for field in dataclasses.fields(config):
        word, value, hint = field.name, getattr(config, field.name), cast(Any, field.type)
        types = {get_origin(kind) or kind for kind in (hint.__args__ if isinstance(hint, UnionType) else (hint,))}
        if tuple in types:
            items = jax.tree.leaves(value)
            check_at_most(f"the entries of {word}", len(items), MOST_BLOCKS, "the blocks of the deepest model")
            if any(type(item) is not int for item in items):
                raise InputError(f"{word} must be integers, not {value!r}.")
            check_at_most(word, max(items, default=0), LARGEST_SIZE, "the largest size")
            continue
        if float in types:
            types |= {int}
        if type(value) not in types:
            allowed = " or ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in types))
            raise InputError(f"{word} must be {allowed.replace('NoneType', 'None')}, not {value!r}.")
        if type(value) is int and float not in types:
            check_at_least(word, value, 1)
            check_at_most(word, value, LARGEST_SIZE, "the largest size")
    blocks = sum(jax.tree.leaves([getattr(config, word, ()) for word in ("depth", "depths")]))
    check_at_most("the number of blocks", blocks, MOST_BLOCKS, "that of the deepest model")
    if not 0 <= config.drop_path_rate < 1:
        raise InputError(f"drop_path_rate must be in [0, 1), not {config.drop_path_rate}.")
    if not 0 < config.mlp_ratio <= LARGEST_SIZE:
        raise InputError(f"mlp_ratio must be above 0 and at most {LARGEST_SIZE}, not {config.mlp_ratio}.")


def _plain(value: Any) -> Any:
    """Tuples for lists, which JSON gives, since a spec must be hashable; and Python's integers for NumPy's."""
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
      attention: one of KINDS, such as "castling", "linear_angular", "softmax" or "angular" (the exact kernel, quadratic
        in tokens), or an attention that `register_attention` added.
      form: "train" or "inference"; a castling model in inference form has no softmax branch.
      num_classes: size of the classifier's output.
      image_size: pixels a side; None is the model's own.
      dtype: compute dtype, float32 or bfloat16; logits are always float32.
      param_dtype: dtype of the parameters.
      rngs: where the parameters are drawn from; None is nnx.Rngs(0).
      **overrides: other fields of the model's configuration (DeiTConfig, LeViTConfig, MViTv2Config), which are timm's
        constructor words: embed_dim, depth, num_heads (tuples for LeViT), depths, stride_q, stride_kv_adaptive (for
        MViTv2), key_dim, patch_size, in_chans, mlp_ratio, qkv_bias, distilled, drop_path_rate, window_size (Swin's
        word, for DeiT); and ours: init_std, qkv_pool (for DeiT), remat, token_conv, token_kernel_size, implementation
        and, for castling, mask_kind.

    Returns:
      A Flax NNX module; `model.spec` holds what it was made from.

    Raises:
      InputError: a name or an override is unknown, or sizes do not fit each other.
    """
    check_known("model", name, MODELS)
    dtypes = {"dtype": _dtype_name(dtype), "param_dtype": _dtype_name(param_dtype)}
    for word, value in dtypes.items():
        check_known(word, value, DTYPES)
    if not isinstance(rngs, nnx.Rngs | _SameKey | None):
        raise InputError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), not {type(rngs).__name__}.")
    if rngs is not None and not hasattr(rngs, "params"):
        raise InputError("rngs must have a stream for params, as nnx.Rngs(0) and nnx.Rngs(params=0) do.")
    overrides = {word: _plain(value) for word, value in overrides.items()}
    sizes = {"num_classes": num_classes} | ({} if image_size is None else {"image_size": image_size})
    config = _configured(name, overrides, sizes)
    core = make_core(
        attention,
        form,
        token_conv=config.token_conv,
        token_kernel_size=config.token_kernel_size,
        implementation=config.implementation,
        mask_kind=config.mask_kind,
    )
    if core.kind.module is not None and not MODELS[name][0].takes_modules:
        raise InputError(
            f"attention={attention!r} replaces the whole multi-head attention, which {name} does not have: choose a "
            "plain transformer such as deit_small."
        )
    layers = Layers(
        dtype=jnp.dtype(dtypes["dtype"]),
        param_dtype=jnp.dtype(dtypes["param_dtype"]),
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        folded=form == "inference",
    )
    model = MODELS[name][0](config, core, layers)
    model.spec = ModelSpec(
        name=name,
        attention=attention,
        form=form,
        num_classes=num_classes,
        image_size=config.image_size,
        **dtypes,
        overrides=tuple(sorted(overrides.items())),
    )
    return model


def _configured(name: str, overrides: dict[str, Any], sizes: dict[str, Any]) -> BackboneConfig:
    """The model's configuration with these fields, checked."""
    _, config = MODELS[name]
    words = [field.name for field in dataclasses.fields(config)]
    for word in overrides:
        check_known(f"argument of {name}", word, [*words, *ARGUMENTS])
    config = dataclasses.replace(config, **overrides, **sizes)
    _check_values(config)
    return config


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(MODELS)


def attentions_of(name: str) -> list[str]:
    """The attentions that the model `name` takes: a module of a kind's own only fits plain transformers."""
    model, _ = MODELS[name]
    return [attention for attention, kind in KINDS.items() if kind.module is None or model.takes_modules]


class _SameKey:
    """Stands in for nnx.Rngs where nothing is drawn: counting the draws is most of the cost of tracing a model."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract_model(name: str, **arguments: Any) -> Backbone:
    """`create_model` with shapes in the place of arrays: nothing is allocated or drawn."""
    return nnx.eval_shape(lambda: create_model(name, **({"rngs": cast(nnx.Rngs, _SameKey())} | arguments)))
