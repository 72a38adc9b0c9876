"""Checkpoints of the whole state: asynchronous, with checksums of their own, and the last good one is found again."""

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

SCORE = "score"  # the figure that is largest in the best checkpoint: `Measure.score` of the evaluation
ACCURACY = "accuracy_inference_form"  # the same in a checkpoint of an earlier version
NOT_EVALUATED = {SCORE: -1e30}  # JSON has no infinity
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
        best = BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_score,
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
        """The best score among the checkpoints that are here; that of NOT_EVALUATED where none was evaluated."""
        step = self._manager.best_step()
        return _score(NOT_EVALUATED if step is None else self._manager.metrics(step))

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
        verify_checksums(state, about["checksums"])
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


def _score(metrics: Any) -> float:
    return metrics[SCORE] if SCORE in metrics else metrics[ACCURACY]


def next_start(folder: epath.Path) -> str:
    """What a run does next that has its checkpoints in `folder`, for the end of a sentence."""
    steps = checkpoint_steps(folder)
    if not steps:
        return "there is no checkpoint yet, so the same command starts anew"
    return f"the same command goes on from step {steps[-1]}"


def check_figures(folder: epath.Path) -> None:
    """Raises an InputError unless a checkpoint's figures can be read, as Orbax's manager does of all at its start."""
    with reading(folder) as checkpointer:
        verify_manifest(folder, "metrics/")
        items = checkpointer.restore(folder, args=ocp.args.Composite(metrics=ocp.args.JsonRestore()))
        _score(items["metrics"])
