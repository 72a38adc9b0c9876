"""Parameter trees in, parameter trees out."""

from castling_jax.convert.files import read_state_dict
from castling_jax.convert.inference_folder import read_description
from castling_jax.convert.paddle import from_paddle, to_paddle
from castling_jax.convert.plan import plan
from castling_jax.convert.torch import from_torch, to_torch
from castling_jax.convert.weights import Weights, read

__all__ = [
    "Weights",
    "from_paddle",
    "from_torch",
    "plan",
    "read",
    "read_description",
    "read_state_dict",
    "to_paddle",
    "to_torch",
]
