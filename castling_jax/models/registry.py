"""Creates models by name."""

import dataclasses
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, TypeVar, cast, get_origin

import jax
import jax.numpy as jnp
from flax import nnx

from castling_jax.errors import InputError, check, check_at_most, check_known
from castling_jax.fields import FLAG, IMAGE_SIZE, TEXT, Values, integer, number, plain
from castling_jax.models.attention.kinds import KINDS, make_core
from castling_jax.models.backbone import Backbone, BackboneConfig, DenseConfig
from castling_jax.models.deit import DeiT, DeiTConfig
from castling_jax.models.layers import Layers
from castling_jax.models.levit import LeViT, LeViTConfig
from castling_jax.models.mae import MAE, MAEConfig
from castling_jax.models.model import Model, ModelSpec
from castling_jax.models.mvitv2 import MViTv2, MViTv2Config
from castling_jax.models.picodet import PicoDet, PicoDetConfig
from castling_jax.models.segmenter import PyramidSegmenter, SegmenterConfig
from castling_jax.sizes import ImageSize

# name -> (class, configuration). The sizes are from table 1 of Touvron et al. (DeiT), table 1 of Graham et al. (LeViT)
# and Li et al. (MViTv2), with the papers' drop-path. deit_micro is ours, for small images on a CPU; it is so narrow
# that it does not learn if its matrices start from DeiT's standard deviation of 0.02.
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
# name -> (class, configuration) of the models on a backbone, which is one of MODELS without its classifier. PicoDet's
# widths and depths are from PicoDet-S, -M and -L in PaddleDetection.
DENSE_MODELS: dict[str, tuple[type[Any], DenseConfig]] = {
    "picodet_s": (PicoDet, PicoDetConfig(neck_channels=96, num_convs=2)),
    "picodet_m": (PicoDet, PicoDetConfig(neck_channels=128, num_convs=4)),
    "picodet_l": (PicoDet, PicoDetConfig(neck_channels=160, num_convs=4)),
    "pyramid_segmenter": (PyramidSegmenter, SegmenterConfig()),
    "mae": (MAE, MAEConfig()),
}
DTYPES = ("float32", "bfloat16")
ARGUMENTS = ("attention", "form", "dtype", "param_dtype", "rngs")  # of create_model, without a configuration's fields
SET_BY_MODEL = ("num_classes", "image_size")  # arguments of a backbone that the model on it sets
C = TypeVar("C", BackboneConfig, DenseConfig)
# Far above any model's. Without these limits, refusing the absurd sizes of a damaged file would take minutes.
MOST_BLOCKS, LARGEST_SIZE = 256, 2**24


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _are_sizes(value: Any) -> bool:
    items = jax.tree.leaves(value)
    return len(items) <= MOST_BLOCKS and all(type(item) is int and item <= LARGEST_SIZE for item in items)


# The values that a configuration's field takes, by the field's name or else by its type. A field for a tuple takes an
# integer too: the model's constructor says how long the tuple has to be.
VALUES: dict[Any, Values] = {
    "image_size": Values(
        object,
        f"an integer from 1 to {LARGEST_SIZE}, or such a height and width",
        lambda size: IMAGE_SIZE.allows(size) and _are_sizes(size),
    ),
    "drop_path_rate": number("[0, 1)"),
    "mlp_ratio": number(f"(0, {LARGEST_SIZE}]"),
    int: integer(1, LARGEST_SIZE),
    float: number("[0, inf)"),
    bool: FLAG,
    str: TEXT,
    tuple: Values(object, f"integers up to {LARGEST_SIZE}, at most {MOST_BLOCKS} of them", _are_sizes),
}


def _check_values(config: BackboneConfig | DenseConfig) -> None:
    """Raises an InputError unless each field has a value that VALUES allows, and the blocks are not too many."""
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), cast(Any, field.type)
        kind, *others = hint.__args__ if isinstance(hint, UnionType) else (hint,)
        # The backbone's arguments are checked with its own configuration.
        if field.name != "backbone_arguments" and not (value is None and type(None) in others):
            VALUES.get(field.name, VALUES[get_origin(kind) or kind]).check(field.name, value)
    blocks = sum(jax.tree.leaves([getattr(config, word, ()) for word in ("depth", "depths")]))
    check_at_most("the number of blocks", blocks, MOST_BLOCKS, "the limit")


def create_model(
    name: str,
    *,
    attention: str = "castling",
    form: str = "train",
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> Model:
    """Builds a model with fresh parameters: a classifier; or a detector, a segmenter or a masked autoencoder on one.

    Args:
      name: one of `list_models`.
      attention: one of KINDS, such as "castling", "linear_angular", "softmax" or "angular" (the exact kernel, quadratic
        in tokens), or an attention that `register_attention` added.
      form: "train" or "inference"; a castling model in inference form has no softmax branch.
      num_classes: size of a classifier's output, or number of a detector's or segmenter's classes; None is 1000, 80
        or 150. A masked autoencoder ignores it.
      image_size: pixels a side, or (height, width); None is the model's own.
      dtype: compute dtype, float32 or bfloat16; outputs are always float32.
      param_dtype: dtype of the parameters.
      rngs: the streams that the parameters are drawn from; None is nnx.Rngs(0).
      **overrides: other fields of the model's configuration (DeiTConfig, LeViTConfig, MViTv2Config). Some are timm's
        constructor arguments: embed_dim, depth, num_heads (tuples for LeViT), depths, stride_q, stride_kv_adaptive (for
        MViTv2), key_dim, patch_size, in_chans, mlp_ratio, qkv_bias, distilled, drop_path_rate, window_size (Swin's
        name, for DeiT). The others are ours: init_std, qkv_pool (for DeiT), remat, token_conv, token_kernel_size,
        fixed_positions, global_pool (for DeiT), implementation and,
        for castling, mask_kind. A detector (PicoDetConfig) takes backbone, the name of a
        classifier; backbone_arguments, a dict of the classifier's arguments; neck ("lc_pan" or "csp_pan"),
        neck_channels and num_convs. A segmenter (SegmenterConfig) takes backbone, backbone_arguments and
        head_channels. A masked autoencoder (MAEConfig) takes backbone, backbone_arguments, mask_ratio, norm_pix_loss,
        decoder_embed_dim, decoder_depth and decoder_num_heads.

    Returns:
      A Flax NNX module; `model.spec` holds the arguments that made it.

    Raises:
      InputError: a name or an override is unknown, or sizes do not fit each other.
    """
    check_known("model", name, list_models())
    dtypes = {"dtype": _dtype_name(dtype), "param_dtype": _dtype_name(param_dtype)}
    for word, value in dtypes.items():
        check_known(word, value, DTYPES)
    if not isinstance(rngs, nnx.Rngs | _SameKey | None):
        raise InputError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), not {type(rngs).__name__}.")
    check(rngs is None or hasattr(rngs, "params"), "rngs must have a stream for params, as nnx.Rngs(0) does.")
    overrides = {word: plain(value) for word, value in overrides.items()}
    size = plain(image_size)
    if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]  # 224 and (224, 224) are one size, so that their specs are equal
    sizes = {"num_classes": plain(num_classes), "image_size": size}
    sizes = {word: value for word, value in sizes.items() if value is not None}
    config: BackboneConfig | DenseConfig
    if name in MODELS:
        config = backbone_config = _configured(name, MODELS[name][1], overrides, sizes)
        backbone_name = name
    else:
        make, dense = DENSE_MODELS[name]
        config = dense_config = _configured(name, dense, overrides, sizes)
        backbone_name, backbone_config = dense_config.backbone, _backbone_config(make, dense_config)
        overrides["backbone"] = backbone_name
    core = make_core(
        attention,
        form,
        token_conv=backbone_config.token_conv,
        token_kernel_size=backbone_config.token_kernel_size,
        implementation=backbone_config.implementation,
        mask_kind=backbone_config.mask_kind,
    )
    make_backbone = MODELS[backbone_name][0]
    if core.kind.module is not None and not make_backbone.takes_modules:
        raise InputError(f"attention={attention!r} is for plain transformers such as deit_small, not {backbone_name}.")
    layers = Layers(
        dtype=jnp.dtype(dtypes["dtype"]),
        param_dtype=jnp.dtype(dtypes["param_dtype"]),
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        folded=form == "inference",
    )
    backbone = make_backbone(backbone_config, core, layers)
    model: Model = backbone if name in MODELS else make(dense_config, backbone, layers)
    model.spec = ModelSpec(
        name=name,
        attention=attention,
        form=form,
        num_classes=config.num_classes,
        image_size=config.image_size,
        **dtypes,
        overrides=tuple(sorted(overrides.items())),
    )
    return model


def _configured(name: str, config: C, overrides: dict[str, Any], sizes: dict[str, Any]) -> C:
    """The configuration `config` of the model `name`, with the overrides and sizes in it and all fields checked."""
    words: list[str] = [field.name for field in dataclasses.fields(config)]
    for word in overrides:
        check_known(f"argument of {name}", word, [*words, *ARGUMENTS])
    config = dataclasses.replace(config, **overrides, **sizes)
    _check_values(config)
    return config


def _backbone_config(model: type[Model], config: DenseConfig) -> BackboneConfig:
    """The configuration of the model's backbone, which has no classifier."""
    check_known("backbone", config.backbone, MODELS)
    backbone = MODELS[config.backbone][1]
    try:
        arguments = dict(config.backbone_arguments)
    except (TypeError, ValueError):
        raise InputError(
            f"backbone_arguments must be a dict of arguments, not {config.backbone_arguments!r}."
        ) from None
    words = [field.name for field in dataclasses.fields(backbone) if field.name not in SET_BY_MODEL]
    for word in arguments:
        check_known(f"backbone argument of {config.backbone}", word, words)
    defaults = {word: value for word, value in model.backbone_defaults.items() if word in words}
    configured = _configured(
        config.backbone, backbone, defaults | arguments, {"image_size": config.backbone_image_size}
    )
    return dataclasses.replace(configured, num_classes=0)


def with_backbone_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Moves the arguments of a backbone into backbone_arguments, where `create_model` takes them.

    A configuration has the arguments of a model and of its backbone side by side. A classifier's stay as they are.
    """
    if arguments["name"] not in DENSE_MODELS:
        return arguments
    own = {field.name for field in dataclasses.fields(DENSE_MODELS[arguments["name"]][1])} | {"name", *ARGUMENTS}
    kept = {word: value for word, value in arguments.items() if word in own}
    return kept | {"backbone_arguments": {word: arguments[word] for word in arguments.keys() - own}}


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes, and that match a pattern such as `levit*` or `*_tiny`.

    Classifiers come first, then models on one of them.
    """
    return [name for name in (*MODELS, *DENSE_MODELS) if fnmatchcase(name, pattern)]


def attentions_of(name: str) -> list[str]:
    """The attentions that the model `name` takes: kinds with a module of their own only fit plain transformers.

    For a model on a backbone all attentions are listed, because the backbone decides which of them fit.
    """
    takes_modules = name in DENSE_MODELS or MODELS[name][0].takes_modules
    return [attention for attention, kind in KINDS.items() if kind.module is None or takes_modules]


class _SameKey:
    """Replaces nnx.Rngs where nothing is drawn. nnx.Rngs counts its draws, which takes most of the tracing time."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract_model(name: str, **arguments: Any) -> Model:
    """`create_model` with shapes instead of arrays: nothing is allocated or drawn."""
    return nnx.eval_shape(lambda: create_model(name, **({"rngs": cast(nnx.Rngs, _SameKey())} | arguments)))


def backbone_classifier(model: Model) -> Model:
    """The backbone of a model on a backbone, as a classifier of one class, with shapes only."""
    spec = model.spec
    make, config = DENSE_MODELS[spec.name]
    config = dataclasses.replace(config, image_size=spec.image_size, **dict(spec.overrides))
    arguments = {**make.backbone_defaults, **dict(config.backbone_arguments)}
    shapes = {"image_size": config.backbone_image_size, "dtype": spec.dtype, "param_dtype": spec.param_dtype}
    return abstract_model(config.backbone, attention=spec.attention, num_classes=1, **shapes, **arguments)
