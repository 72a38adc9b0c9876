"""castling_jax: Castling-ViT (You et al., CVPR 2023) in JAX and Flax, for TPU pods.

The whole public API, with the modules `ops` (the mathematics), `convert` (parameter trees) and `plots` (figures). Each
name is imported when it is first used: `import castling_jax` alone does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castling_jax import convert, ops, plots
    from castling_jax.convert.inference import check_switch, to_inference
    from castling_jax.convert.inference_folder import load_inference
    from castling_jax.data.preprocess import preprocess
    from castling_jax.errors import InputError
    from castling_jax.maps import attention_maps
    from castling_jax.models.attention.kinds import register_attention
    from castling_jax.models.description import describe
    from castling_jax.models.registry import create_model, list_models
    from castling_jax.models.variables import apply, features, forward_train, get_variables
    from castling_jax.normalization import normalize_images
    from castling_jax.predictions import predict
    from castling_jax.preprocessing import Preprocessing
    from castling_jax.training.config_files import load_config
    from castling_jax.training.run import run as train

__version__ = "0.2.0"

__all__ = [
    "InputError",
    "Preprocessing",
    "apply",
    "attention_maps",
    "check_switch",
    "convert",
    "create_model",
    "describe",
    "features",
    "forward_train",
    "get_variables",
    "list_models",
    "load_config",
    "load_inference",
    "normalize_images",
    "ops",
    "plots",
    "predict",
    "preprocess",
    "register_attention",
    "to_inference",
    "train",
]

# Public name -> the module that defines it; "module:name" where the module uses another name; "" for a module itself.
_PLACES = {
    "InputError": "errors",
    "Preprocessing": "preprocessing",
    "apply": "models.variables",
    "attention_maps": "maps",
    "check_switch": "convert.inference",
    "convert": "",
    "create_model": "models.registry",
    "describe": "models.description",
    "features": "models.variables",
    "forward_train": "models.variables",
    "get_variables": "models.variables",
    "list_models": "models.registry",
    "load_config": "training.config_files",
    "load_inference": "convert.inference_folder",
    "normalize_images": "normalization",
    "ops": "",
    "plots": "",
    "predict": "predictions",
    "preprocess": "data.preprocess",
    "register_attention": "models.attention.kinds",
    "to_inference": "convert.inference",
    "train": "training.run:run",
}


if not TYPE_CHECKING:  # a type checker that saw this function would accept every attribute

    def __getattr__(name):
        if name not in _PLACES:
            raise AttributeError(f"module 'castling_jax' has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        if not module:
            return importlib.import_module(f"castling_jax.{name}")
        value = getattr(importlib.import_module(f"castling_jax.{module}"), attribute or name)
        # Python calls __getattr__ only for names that the module lacks, so the next look-up costs nothing.
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
