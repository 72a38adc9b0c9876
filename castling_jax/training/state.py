"""The state of training: everything that a step changes."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from castling_jax.models.variables import Variables, flatten

OPTIONAL: dict[str, Any] = {"batch_stats": {}, "ema": {}}


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of training, a pytree. The place in the data is no part of it: it follows from the step.

    Attributes:
      params: the parameters, nested dicts.
      batch_stats: batch norm's running statistics, nested dicts; {} without batch norm.
      opt_state: the optimiser's state.
      ema: moving averages of `variables`, with the same nesting; {} if none are kept.
      step: number of steps made so far.
      key: constant random key; each step's key is this one with the step folded in.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    step: Int[Array, ""]
    key: Key[Array, ""]

    @property
    def variables(self) -> Variables:
        """The raw variables, without averaging, for `apply` and `to_inference`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def weights(self) -> dict[str, Variables]:
        """The weights to evaluate and export: the variables as "raw" and, if kept, their averages as "averaged"."""
        return {"raw": self.variables} | ({"averaged": self.ema} if self.ema else {})

    @property
    def skipped_steps(self) -> int:
        """Number of steps that left the parameters unchanged: the steps that the optimiser has not counted."""
        (_, updates), *_ = optax.tree.get_all_with_path(self.opt_state, "count")
        return int(self.step) - int(updates)


def _children(state: TrainState) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(name for name in vars(state) if name not in OPTIONAL or getattr(state, name))
    return [(jax.tree_util.GetAttrKey(name), getattr(state, name)) for name in names], names


# Empty fields are left out of the tree, so that a checkpoint of a model without batch norm has no statistics.
jax.tree_util.register_pytree_with_keys(
    TrainState,
    _children,
    lambda names, children: TrainState(**{**OPTIONAL, **dict(zip(names, children, strict=True))}),
)


def create_state(
    variables: Variables, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False
) -> TrainState:
    """The state before the first step; with `ema` it keeps moving averages, which start at the variables."""
    params = variables["params"]
    return TrainState(
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        # A copy: the step donates the state, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, variables) if ema else {},
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
    )


def parameters_sha256(params: Any) -> str:
    """SHA-256 of the parameters' bytes in the order of their sorted paths; two equal runs have the same."""
    digest = hashlib.sha256()
    for leaf in flatten(params).values():
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def parameter_table(state: TrainState, shardings: Any) -> str:
    """A text: the mesh; each parameter's name, shape, dtype, size and the axes that split it; the total size."""
    where = flatten(shardings.params)
    rows = [
        (path, str(leaf.shape), leaf.dtype.name, f"{leaf.size:,}", _spec(where[path]))
        for path, leaf in flatten(state.params).items()
    ]
    rows.append(("all", "", "", f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mesh = ", ".join(f"{axis} {size}" for axis, size in shardings.step.mesh.shape.items())
    return "\n".join([f"mesh: {mesh}", *lines, ""])


def _spec(sharding: jax.sharding.NamedSharding) -> str:
    return ", ".join(axis or "-" for axis in sharding.spec) if any(sharding.spec) else "on every device"
