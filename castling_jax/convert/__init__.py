"""Parameter trees in, parameter trees out."""

from castling_jax.convert.plan import plan
from castling_jax.convert.torch import from_torch, read_state_dict, to_torch

__all__ = ["from_torch", "plan", "read_state_dict", "to_torch"]
