"""Checkpoints of the whole state: asynchronous, with checksums of their own, and the last good one is found again."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from castling_jax.ops.errors import InputError
from castling_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"  # a run's folder of them
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides the state.

    Attributes:
      data: the training iterator's place, as its get_state gives it.
      train_seconds: how long the loop had run.
    """

    data: dict[str, Any]
    train_seconds: float


class Checkpoints:
    """The checkpoints of a run, in a folder of its own.

    Args:
      folder: made if need be.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save; returns as soon as the state is copied, while the files are still being written."""
        about = dataclasses.asdict(progress) | {"checksums": checksums(state)}
        self._manager.save(
            int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        )

    def restore(self, template: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that is whole, laid out as `template` is; None where there is none at all.

        A damaged one is said in a warning, moved aside to FOLDER_damaged/STEP, and the one before it is tried.

        Raises:
          InputError: there are checkpoints, and all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step, template)
            except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
                reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
                aside = self.folder.with_name(f"{self.folder.name}_damaged") / str(step)
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)
                self._manager.reload()
                _LOGGER.warning("the checkpoint of step %d is damaged (%s) and was moved to '%s'", step, reason, aside)
        if steps:
            raise InputError(
                f"none of the {len(steps)} checkpoints in '{self.folder}' is whole: remove it to start anew."
            )
        return None

    def _read(self, step: int, template: TrainState) -> tuple[TrainState, Progress]:
        items = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template), about=ocp.args.JsonRestore())
        )
        state, about = items["state"], items["about"]
        check_checksums(state, about["checksums"])
        return state, Progress(about["data"], about["train_seconds"])

    def close(self) -> None:
        """Waits until all that was started is written."""
        self._manager.close()


def check_checksums(tree: Any, expected: dict[str, int], *, within: str = "") -> None:
    """Raises a ValueError unless a tree, which stands at the path `within` of what was saved, has its checksums."""
    for path, checksum in checksums(tree).items():
        if expected.get(within + path) != checksum:
            raise ValueError(f"the checksum of {(within + path).lstrip('.')} is not the one it was saved with")


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of each leaf of a pytree, by its path.

    It is a sum, modulo 2^32, of the elements' bits, each times an odd number that depends on its place: any one
    flipped bit changes it, exchanged elements do but for a chance of 2^-32, and it is computed where the shards are,
    without gathering them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(total) for (path, _), total in zip(leaves, sums, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = (place ^ (place >> 16)) * jnp.uint32(0x9E3779B1)  # spreads neighbouring places
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
