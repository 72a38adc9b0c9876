"""Checkpoints of the whole state: asynchronous, with checksums of their own, and the last good one is found again."""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from castling_jax.errors import InputError, in_one_sentence, reason
from castling_jax.storage import is_remote, write_atomically
from castling_jax.training.manifest import MANIFEST_FILE, check_manifest, write_manifest
from castling_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"  # a run's folder of them
BEST = "accuracy_inference_form"  # the figure by which a checkpoint is the best: what the switch will leave
COMMIT_SUCCESS_FILE = "commit_success.txt"  # Orbax's, in a bucket
NOT_EVALUATED = {BEST: -1.0}
FORMAT = 2  # of what is saved beside the state. 1 had neither manifest, nor mask threshold, nor the data's fingerprint
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides the state. The place in the data is the state's step.

    Attributes:
      train_seconds: how long the loop had run.
      figures: of the evaluation of this very step, where there was one. They are for choosing the best checkpoint, and
        not restored.
      mask_threshold: of the last step that was made; None in a checkpoint of an earlier version.
    """

    train_seconds: float
    figures: dict[str, float] | None = None
    mask_threshold: float | None = None


class Checkpoints:
    """The checkpoints of a run, in a folder of its own: the newest, and the best of those that were evaluated.

    All processes make the same calls. What is in the folder does not depend on the mesh or on the number of processes.

    Damaged checkpoints that stand in the way of the newest whole one are said in warnings, and moved aside to
    FOLDER_damaged/STEP.

    Args:
      folder: made if need be; a local one that all processes share, or gs://.
      keep: how many of the newest stay.
      data: the fingerprint of the data that the run learns from, which every checkpoint holds.

    Raises:
      InputError: there are checkpoints, and all are damaged; the folder stays as it is.
    """

    def __init__(self, folder: epath.Path, *, keep: int, data: dict[str, Any] | None = None):
        self.folder = folder
        self._data = data
        # Before there is a manager, which reads every checkpoint's figures.
        count, self._whole = _agree_on_whole(folder)
        if count and self._whole is None:
            raise InputError(f"none of the {count} checkpoints in '{folder}' is whole: remove it to start anew.")
        # What is without figures was being deleted when a run was killed.
        best = BestN(get_metric_fn=_figure, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_figure,
            cleanup_tmp_directories=True,
            # Called by process 0 when all files are there, and before they become the checkpoint.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save; returns as soon as the state is copied, while the files are still being written.

        Raises:
          InputError: this one, or the one before, could not be written.
        """
        about = {
            "format": FORMAT,
            "train_seconds": progress.train_seconds,
            "mask_threshold": progress.mask_threshold,
            "data": self._data,
            "checksums": checksums(state),
        }
        with self._saying_what_failed():
            self._manager.wait_until_finished()  # with the one before, whose manifest may still be to be written
            self._saving = int(state.step)
            self._manager.save(
                self._saving,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
                metrics=progress.figures or NOT_EVALUATED,
            )

    def best(self) -> float:
        """The best figure among the checkpoints that are here; below 0 where none was evaluated."""
        step = self._manager.best_step()
        return _figure(NOT_EVALUATED if step is None else self._manager.metrics(step))

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes are to save at this step and end, because one of them was told to by SIGTERM."""
        return self._manager.reached_preemption(step)

    def saved_data(self) -> dict[str, Any] | None:
        """The fingerprint in the checkpoint that `restore` begins with; None where there is none."""
        if self._whole is None:
            return None
        items = self._manager.restore(self._whole, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        return items["about"].get("data")

    def restore(self, template: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that is whole, laid out as `template` is; None where there was none at the start.

        Raises:
          InputError: there are checkpoints, and none fits the template; the folder stays as it is.
        """
        failed: dict[int, str] = {}
        while (step := self._whole) is not None:
            try:
                restored, why = self._restore(step, template), ""
            except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
                restored, why = None, in_one_sentence(reason(error))
            if multihost_utils.process_allgather(np.bool_(restored is not None)).all():
                if failed:
                    if jax.process_index() == 0:
                        _move_aside(self.folder, failed)
                    multihost_utils.sync_global_devices("moved aside")
                    self._manager.reload()
                return restored
            why = why or "another process could not read it"
            failed[step] = f"the checkpoint '{self.folder / str(step)}' cannot be restored ({why})."
            _, self._whole = _agree_on_whole(self.folder, below=step)
        if failed:
            raise InputError(f"{next(iter(failed.values())).rstrip('.')}, nor one before it: remove it to start anew.")
        return None

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, Progress]:
        items = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template), about=ocp.args.JsonRestore())
        )
        state, about = items["state"], items["about"]
        check_checksums(state, about["checksums"])
        return state, Progress(float(about["train_seconds"]), mask_threshold=about.get("mask_threshold"))

    def _write_manifest(self) -> None:
        # Until it is renamed, its name goes on behind the number; in a bucket it has its own from the first.
        (unfinished,) = (path for path in self.folder.iterdir() if path.name.split(".")[0] == str(self._saving))
        write_manifest(unfinished)

    def wait(self) -> None:
        """Waits until all that was started is written.

        Raises:
          InputError: it could not be.
        """
        with self._saying_what_failed():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits likewise, and ends.

        Raises:
          InputError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _saying_what_failed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
            steps = checkpoint_steps(self.folder)
            whole = f"those of steps {', '.join(map(str, steps))} are whole, and " if steps else ""
            raise InputError(
                f"a checkpoint could not be written to '{self.folder}' ({reason(error)}); {whole}"
                f"{next_start(self.folder)}."
            ) from error


def _agree_on_whole(folder: epath.Path, *, below: int | None = None) -> tuple[int, int | None]:
    """`_find_whole` of process 0, on all. Reading together, one that fails would leave the others waiting."""
    found = (0, -1) if jax.process_index() else _find_whole(folder, below)
    count, step = map(int, multihost_utils.broadcast_one_to_all(np.array(found, np.int32)))
    return count, None if step < 0 else step


def _find_whole(folder: epath.Path, below: int | None) -> tuple[int, int]:
    """(how many checkpoints there are, the newest whole one's step or -1); with a whole one, others are moved aside.

    Of those before the whole one only the figures are read.

    Args:
      folder: of the checkpoints.
      below: the step before which one is looked for; None is all.
    """
    steps, whole = [step for step in checkpoint_steps(folder) if below is None or step < below], -1
    damaged: dict[int, str] = {}
    for step in steps[::-1]:
        try:
            check_figures(folder / str(step))
            if whole < 0:
                read_checkpoint(folder / str(step))
        except InputError as error:
            damaged[step] = str(error)
        else:
            whole = max(whole, step)
    if whole >= 0:
        _move_aside(folder, damaged)
    return len(steps), whole


def _move_aside(folder: epath.Path, damaged: dict[int, str]) -> None:
    """Moves checkpoints to FOLDER_damaged/STEP, with what is wrong with them in STEP.txt."""
    for step, sentence in damaged.items():
        aside = folder.parent / f"{folder.name}_damaged" / str(step)
        if aside.exists():  # from an earlier time, or half of it, where moving it was interrupted in a bucket
            aside.rmtree()
        aside.parent.mkdir(exist_ok=True)
        # In a bucket a folder is there when a file is in it, and nothing is moved to where there is no folder.
        write_atomically(aside.parent / f"{step}.txt", f"{sentence}\n".encode())
        (folder / str(step)).rename(aside)
        _LOGGER.warning("%s It was moved to '%s'.", sentence, aside)


def _figure(metrics: Any) -> float:
    return metrics[BEST]


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """The steps of which a folder of checkpoints holds one, sorted; what is still being written does not count."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    if is_remote(folder):  # where a folder cannot be renamed once it is whole, Orbax marks it
        steps = [path for path in steps if (path / COMMIT_SUCCESS_FILE).exists()]
    return sorted(int(path.name) for path in steps)


def next_start(folder: epath.Path) -> str:
    """What a run does next that has its checkpoints in `folder`, for the end of a sentence."""
    steps = checkpoint_steps(folder)
    if not steps:
        return "there is no checkpoint yet, so the same command starts anew"
    return f"the same command goes on from step {steps[-1]}"


def read_checkpoint(folder: epath.Path, names: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint in this process alone, and holds it against its checksums.

    Args:
      folder: of one checkpoint.
      names: of the parts of the state that are wanted, such as "params"; None is all, and those that are not there are
        left out.

    Returns:
      (state, about): nested dicts of numpy arrays, of what was asked for; and what was saved beside the state.

    Raises:
      InputError: it is damaged; says how, and which other there is.
    """
    with _reading(folder) as checkpointer:
        has_manifest = check_manifest(folder)
        shapes: dict[str, Any] = checkpointer.metadata(folder).item_metadata["state"].tree
        wanted = {name: part for name, part in shapes.items() if names is None or name in names}
        if not wanted:
            return {}, {}
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state_args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        items = checkpointer.restore(folder, args=ocp.args.Composite(state=state_args, about=ocp.args.JsonRestore()))
        check_checksums(items["state"], items["about"]["checksums"])
        if not has_manifest and items["about"].get("format", 1) >= FORMAT:
            raise ValueError(f"its {MANIFEST_FILE} is missing")
        return items["state"], items["about"]


def check_figures(folder: epath.Path) -> None:
    """Raises an InputError unless a checkpoint's figures can be read, as Orbax's manager does of all at its start."""
    with _reading(folder) as checkpointer:
        check_manifest(folder, "metrics/")
        items = checkpointer.restore(folder, args=ocp.args.Composite(metrics=ocp.args.JsonRestore()))
        _figure(items["metrics"])


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[ocp.Checkpointer]:
    """What reads a checkpoint in this process alone; all that it raises is an InputError that says what is damaged."""
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()}, primary_host=jax.process_index())
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        metrics=ocp.JsonCheckpointHandler(filename="metrics", multiprocessing_options=alone),  # as the manager's own
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
        others = [step for step in checkpoint_steps(folder.parent) if str(step) != folder.name]
        instead = f"; try '{folder.parent / str(others[-1])}'" if others else ""
        raise InputError(
            f"the checkpoint '{folder}' is damaged ({in_one_sentence(reason(error))}){instead}."
        ) from error


def check_checksums(tree: Any, expected: dict[str, int]) -> None:
    """Raises a ValueError unless a tree, or a part of what was saved, has the checksums of that."""
    for path, checksum in checksums(tree).items():
        if expected.get(path) != checksum:
            raise ValueError(f"the checksum of {path} is not the one it was saved with")


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of each leaf of a pytree, by its path.

    It is a sum, modulo 2^32, of the elements' bits, each times an odd number that depends on its place: any one
    flipped bit changes it, exchanged elements do but for a chance of 2^-32, and it is computed where the shards are,
    without gathering them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(total) for name, total in zip(names, sums, strict=True)}


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
