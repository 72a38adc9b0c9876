"""Checkpoints of the whole state: saved asynchronously, verified by checksums, restored from the newest good one."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from castling_jax.convert.checkpoint import FORMAT, checkpoint_steps, read_checkpoint, reading
from castling_jax.convert.checksums import checksums, verify_checksums
from castling_jax.convert.manifest import verify_manifest, write_manifest
from castling_jax.errors import InputError, in_one_sentence, reason
from castling_jax.storage import write_atomically
from castling_jax.training.state import TrainState

SCORE = "score"  # the figure that is largest in the best checkpoint: `Measure.score` of its evaluation
ACCURACY = "accuracy_inference_form"  # the score in a checkpoint of an earlier version
NOT_EVALUATED = {SCORE: -1e30}  # a finite number, because JSON has no infinity
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides the state. The state's step is also the place in the data.

    Attributes:
      train_seconds: seconds that the loop had run.
      figures: the evaluation's figures at this very step; None without an evaluation at it. They choose the best
        checkpoint, and are not restored.
      mask_threshold: threshold of the last step; None in a checkpoint of an earlier version.
    """

    train_seconds: float
    figures: dict[str, float] | None = None
    mask_threshold: float | None = None


class Checkpoints:
    """The checkpoints of a run: the newest ones, and the best of those that were evaluated.

    All processes make the same calls. The content of the folder does not depend on the mesh or the number of processes.

    If damaged checkpoints are newer than the newest complete one, they are moved to FOLDER_damaged/STEP, with a warning
    for each.

    Args:
      folder: the checkpoints' own folder, created if need be; local and shared by all processes, or gs://.
      keep: number of the newest checkpoints to keep.
      data: fingerprint of the data that the run learns from, saved in every checkpoint.

    Raises:
      InputError: there are checkpoints, and all are damaged; the folder stays as it is.
    """

    def __init__(self, folder: epath.Path, *, keep: int, data: dict[str, Any] | None = None):
        self.folder = folder
        self._data = data
        # Before there is a manager: it reads every checkpoint's figures, and fails at a damaged one.
        count, self._whole = _agree_on_whole(folder)
        if count and self._whole is None:
            raise InputError(f"none of the {count} checkpoints in '{folder}' is whole: remove it to start anew.")
        # A checkpoint without figures was half deleted when a run was killed.
        best = BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_score,
            cleanup_tmp_directories=True,
            # Orbax calls it on process 0 when all files are written, before it renames them to the checkpoint.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save; returns as soon as the state is copied, while the files are still being written.

        Raises:
          InputError: this checkpoint, or the one before it, could not be written.
        """
        about = {
            "format": FORMAT,
            "train_seconds": progress.train_seconds,
            "mask_threshold": progress.mask_threshold,
            "data": self._data,
            "checksums": checksums(state),
        }
        with self._saying_what_failed():
            # The checkpoint before may still need its manifest, which `_write_manifest` finds by `_saving`.
            self._manager.wait_until_finished()
            self._saving = int(state.step)
            self._manager.save(
                self._saving,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
                metrics=progress.figures or NOT_EVALUATED,
            )

    def best(self) -> float:
        """The best score among the kept checkpoints; NOT_EVALUATED's score if none was evaluated."""
        step = self._manager.best_step()
        return _score(NOT_EVALUATED if step is None else self._manager.metrics(step))

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes must save at this step and end, because one of them has received SIGTERM."""
        return self._manager.reached_preemption(step)

    def saved_data(self) -> dict[str, Any] | None:
        """The fingerprint in the checkpoint that `restore` tries first; None without a checkpoint."""
        if self._whole is None:
            return None
        items = self._manager.restore(self._whole, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        return items["about"].get("data")

    def restore(self, template: TrainState) -> tuple[TrainState, Progress] | None:
        """Restores the newest complete checkpoint with the template's shapes and shardings; None without a checkpoint.

        Raises:
          InputError: there are checkpoints, and none fits the template; the folder stays as it is.
        """
        failed: dict[int, str] = {}
        while (step := self._whole) is not None:
            restored = self._restore(step, template)
            if not isinstance(restored, str):
                # Moved only now that an older one is restored: without one, all stay for the user to look at.
                if failed:
                    if jax.process_index() == 0:
                        _move_aside(self.folder, failed)
                    multihost_utils.sync_global_devices("moved aside")
                    self._manager.reload()
                return restored
            failed[step] = f"the checkpoint '{self.folder / str(step)}' cannot be restored ({restored})."
            _, self._whole = _agree_on_whole(self.folder, below=step)
        if failed:
            raise InputError(f"{next(iter(failed.values())).rstrip('.')}, nor one before it: remove it to start anew.")
        return None

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, Progress] | str:
        """What a checkpoint holds, or why it cannot be restored: one of the two on all processes."""
        items, why = None, "another process could not read it"
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template), about=ocp.args.JsonRestore())
        try:
            items = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
            why = in_one_sentence(reason(error))
        # Process 0 has read the newest checkpoint alone. Another process may still fail to read its part, and then none
        # may go on to the checksums, which need all of them.
        all_have_read = multihost_utils.process_allgather(np.bool_(items is not None)).all()
        if items is None or not all_have_read:
            return why
        state, about = items["state"], items["about"]
        try:
            verify_checksums(state, about["checksums"])
            return state, Progress(float(about["train_seconds"]), mask_threshold=about.get("mask_threshold"))
        except (KeyError, ValueError) as error:
            return in_one_sentence(reason(error))

    def _write_manifest(self) -> None:
        # On a disk the folder is still called STEP.orbax-checkpoint-tmp...; in a bucket it is STEP from the start.
        (unfinished,) = (path for path in self.folder.iterdir() if path.name.split(".")[0] == str(self._saving))
        write_manifest(unfinished)

    def wait(self) -> None:
        """Waits until the checkpoint that is being saved is written.

        Raises:
          InputError: it could not be written.
        """
        with self._saying_what_failed():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and closes the manager.

        Raises:
          InputError: what `wait` raises.
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
    """`_find_whole` on process 0, its result on all: if all read, one that fails would keep the others waiting."""
    local = (0, -1) if jax.process_index() else _find_whole(folder, below)
    count, step = map(int, multihost_utils.broadcast_one_to_all(np.array(local, np.int32)))
    return count, None if step < 0 else step


def _find_whole(folder: epath.Path, below: int | None) -> tuple[int, int]:
    """(number of checkpoints, step of the newest complete one or -1); moves damaged ones aside if one is complete.

    Checkpoints older than the newest complete one are not read, except for their figures.

    Args:
      folder: the folder of the checkpoints.
      below: only checkpoints before this step count; None counts all.
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
    """Moves checkpoints to FOLDER_damaged/STEP, and writes what is wrong with each into STEP.txt beside it."""
    for step, sentence in damaged.items():
        aside = folder.parent / f"{folder.name}_damaged" / str(step)
        if aside.exists():  # an earlier one, or a part of this one if a move in a bucket was interrupted
            aside.rmtree()
        aside.parent.mkdir(exist_ok=True)
        # The text first: in a bucket a folder exists only once a file is in it, and rename needs the target's folder.
        write_atomically(aside.parent / f"{step}.txt", f"{sentence}\n".encode())
        (folder / str(step)).rename(aside)
        _LOGGER.warning("%s It was moved to '%s'.", sentence, aside)


def _score(metrics: Any) -> float:
    return metrics[SCORE] if SCORE in metrics else metrics[ACCURACY]


def next_start(folder: epath.Path) -> str:
    """What the same command would do next with the checkpoints in `folder`, for the end of a sentence."""
    steps = checkpoint_steps(folder)
    if not steps:
        return "there is no checkpoint yet, so the same command starts anew"
    return f"the same command goes on from step {steps[-1]}"


def check_figures(folder: epath.Path) -> None:
    """Raises an InputError unless a checkpoint's figures can be read, as Orbax's manager reads them when it starts."""
    with reading(folder) as checkpointer:
        verify_manifest(folder, "metrics/")
        items = checkpointer.restore(folder, args=ocp.args.Composite(metrics=ocp.args.JsonRestore()))
        _score(items["metrics"])
