"""Everything that a step changes."""

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
    """The whole state of training but the place in the data: a pytree.

    Attributes:
      params: the parameters, nested dicts.
      batch_stats: batch norm's running statistics, nested dicts; {} without batch norm.
      opt_state: the optimiser's.
      ema: moving averages of the variables, as `variables` has them; {} where none are kept.
      step: how many steps were made.
      key: where each step's random key comes from; it does not change.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    step: Int[Array, ""]
    key: Key[Array, ""]

    @property
    def variables(self) -> Variables:
        """What `apply` and `to_inference` take, as the optimiser left it."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def weights(self) -> dict[str, Variables]:
        """All that can be evaluated and exported: the variables as "raw" and, where they are kept, as "averaged"."""
        return {"raw": self.variables} | ({"averaged": self.ema} if self.ema else {})

    @property
    def skipped_steps(self) -> int:
        """How many of the steps left the parameters as they were: those that the optimiser has not counted."""
        (_, updates), *_ = optax.tree.get_all_with_path(self.opt_state, "count")
        return int(self.step) - int(updates)


def _children(state: TrainState) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(name for name in vars(state) if name not in OPTIONAL or getattr(state, name))
    return [(jax.tree_util.GetAttrKey(name), getattr(state, name)) for name in names], names


# What is empty is no part of the tree: a checkpoint of a model without batch norm has no place for statistics.
jax.tree_util.register_pytree_with_keys(
    TrainState,
    _children,
    lambda names, children: TrainState(**{**OPTIONAL, **dict(zip(names, children, strict=True))}),
)


def create_state(
    variables: Variables, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False
) -> TrainState:
    """The state before the first step; with `ema` it keeps moving averages, which start as the variables are."""
    params = variables["params"]
    return TrainState(
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, variables) if ema else {},
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
    )


def parameters_sha256(params: Any) -> str:
    """SHA-256 of the parameters' bytes in the order of their sorted paths: what two equal runs share."""
    digest = hashlib.sha256()
    for leaf in flatten(params).values():
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def parameter_table(state: TrainState, shardings: Any) -> str:
    """The mesh; a line for each parameter: its name, shape, dtype, size, and the axes that split it; and the sum."""
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
