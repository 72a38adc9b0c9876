"""Reads one checkpoint of a run, in this process alone and without changing its folder.

RUN/checkpoints/STEP is an Orbax checkpoint: `state`, the arrays; `about`, a JSON object with the other things that a
run saves, and the arrays' checksums; `metrics`, a JSON object of figures; and SHA256SUMS, the manifest of all files but
the arrays' bytes.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from castling_jax.convert.checksums import verify_checksums
from castling_jax.convert.manifest import MANIFEST_FILE, verify_manifest
from castling_jax.errors import InputError, in_one_sentence, reason
from castling_jax.storage import is_remote

CHECKPOINTS = "checkpoints"  # the folder of checkpoints in a run's folder
COMMIT_SUCCESS_FILE = "commit_success.txt"  # Orbax marks a complete checkpoint in a bucket by this file
STEP = re.compile("0|[1-9][0-9]{0,8}")  # a checkpoint's name, as a run writes it
FORMAT = 2  # of `about`. Format 1 had no manifest, no mask threshold, and no fingerprint of the data


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """The sorted steps of the checkpoints in a folder; a checkpoint that is still being written does not count."""
    # On a disk, Orbax renames a checkpoint to its step once it is complete.
    steps = [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.is_dir() else []
    if is_remote(folder):  # in a bucket, which cannot rename folders, it writes a mark instead
        steps = [path for path in steps if (path / COMMIT_SUCCESS_FILE).exists()]
    return sorted(int(path.name) for path in steps)


def check_names(folder: epath.Path) -> None:
    """Refuses a folder in which a run cannot keep checkpoints.

    Raises:
      InputError: the folder is a file, or a name in it is a number that no run writes but that Orbax takes for a step:
        with leading zeros, with digits other than 0 to 9, or with too many digits.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file, but the folder of the checkpoints has to be there.")
    for name in sorted(path.name for path in folder.iterdir()) if folder.exists() else ():
        if name.isdigit() and not STEP.fullmatch(name):
            raise InputError(f"'{folder / name}' is not named as a checkpoint is, by its step: move it elsewhere.")


def read_checkpoint(folder: epath.Path, names: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint in this process alone, and verifies its checksums.

    Args:
      folder: the folder of one checkpoint.
      names: the parts of the state to read, such as "params"; None reads all. Parts that are missing are left out.

    Returns:
      (state, about): the parts as nested dicts of numpy arrays, and the JSON object that was saved beside the state.

    Raises:
      InputError: the checkpoint is damaged; the message says how.
    """
    import orbax.checkpoint as ocp  # here, because it takes seconds to import and converting arrays does not need it

    with reading(folder) as checkpointer:
        # First, because Orbax reads the files that the manifest covers without checking them.
        has_manifest = verify_manifest(folder)
        shapes: dict[str, Any] = checkpointer.metadata(folder).item_metadata["state"].tree
        wanted = {name: part for name, part in shapes.items() if names is None or name in names}
        if not wanted:
            return {}, {}
        # As NumPy arrays on this host: the run's own mesh and devices need not exist here.
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state_args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        items = checkpointer.restore(folder, args=ocp.args.Composite(state=state_args, about=ocp.args.JsonRestore()))
        verify_checksums(items["state"], items["about"]["checksums"])
        # A checkpoint of format 1 never had a manifest; that of a later format was removed.
        if not has_manifest and items["about"].get("format", 1) >= FORMAT:
            raise ValueError(f"its {MANIFEST_FILE} is missing")
        return items["state"], items["about"]


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[Any]:
    """An Orbax Checkpointer for this process alone; any exception inside becomes an InputError about the damage."""
    import orbax.checkpoint as ocp

    # By default Orbax waits for all processes of the run, which do not make this call together.
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()}, primary_host=jax.process_index())
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        metrics=ocp.JsonCheckpointHandler(filename="metrics", multiprocessing_options=alone),  # the manager's file name
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
        raise InputError(f"the checkpoint '{folder}' is damaged ({in_one_sentence(reason(error))}).") from error
