"""Everything that a step changes."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from castling_jax.models.variables import flatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of training but the place in the data: a pytree.

    Attributes:
      params: the parameters, nested dicts.
      opt_state: the optimiser's.
      step: how many steps were made.
      key: where each step's random key comes from; it does not change.
    """

    params: Any
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]


def create_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed))


def parameters_sha256(params: Any) -> str:
    """SHA-256 of the parameters' bytes in the order of their sorted paths: what two equal runs share."""
    digest = hashlib.sha256()
    for leaf in flatten(params).values():
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
