"""castling_jax: Castling-ViT (You et al., CVPR 2023) in JAX and Flax, for TPU pods.

The whole public API, with the modules `ops` (the mathematics) and `convert` (parameter trees).
"""

from castling_jax import convert, ops
from castling_jax.convert.inference import check_switch, to_inference
from castling_jax.convert.inference_folder import load_inference
from castling_jax.data.preprocess import preprocess
from castling_jax.data.transforms import normalize
from castling_jax.errors import InputError
from castling_jax.models.attention.kinds import register_attention
from castling_jax.models.registry import create_model, list_models
from castling_jax.models.variables import apply, features, forward_train, get_variables
from castling_jax.preprocessing import Preprocessing

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Preprocessing",
    "apply",
    "check_switch",
    "convert",
    "create_model",
    "features",
    "forward_train",
    "get_variables",
    "list_models",
    "load_inference",
    "normalize",
    "ops",
    "preprocess",
    "register_attention",
    "to_inference",
]
