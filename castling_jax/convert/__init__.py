"""Parameter trees in, parameter trees out."""

from castling_jax.convert.torch import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
