"""One checkpoint of a run, read in this process alone; nothing in its folder is touched.

RUN/checkpoints/STEP is Orbax's: `state`, the arrays; `about`, a JSON of what was saved beside them, with their
checksums; `metrics`, a JSON of figures; and SHA256SUMS, the manifest of all but the arrays' bytes.
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

CHECKPOINTS = "checkpoints"  # a run's folder of them
COMMIT_SUCCESS_FILE = "commit_success.txt"  # Orbax's, in a bucket
STEP = re.compile("0|[1-9][0-9]{0,8}")  # a checkpoint's name, as a run writes it
FORMAT = 2  # of what is saved beside the state. 1 had neither manifest, nor mask threshold, nor the data's fingerprint


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """The steps of which a folder of checkpoints holds one, sorted; what is still being written does not count."""
    steps = [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.is_dir() else []
    if is_remote(folder):  # where a folder cannot be renamed once it is whole, Orbax marks it
        steps = [path for path in steps if (path / COMMIT_SUCCESS_FILE).exists()]
    return sorted(int(path.name) for path in steps)


def check_names(folder: epath.Path) -> None:
    """Refuses what a run cannot keep its checkpoints in, or beside.

    Raises:
      InputError: it is a file, or a name in it is a number that no run writes: with leading zeros, other digits than 0
        to 9, or too many, which Orbax takes for a step all the same.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file, and the checkpoints' folder is to be there.")
    for name in sorted(path.name for path in folder.iterdir()) if folder.exists() else ():
        if name.isdigit() and not STEP.fullmatch(name):
            raise InputError(f"'{folder / name}' is not named as a checkpoint is, by its step: move it elsewhere.")


def read_checkpoint(folder: epath.Path, names: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint in this process alone, and holds it against its checksums.

    Args:
      folder: of one checkpoint.
      names: of the parts of the state that are wanted, such as "params"; None is all, and those that are not there are
        left out.

    Returns:
      (state, about): nested dicts of numpy arrays, of what was asked for; and what was saved beside the state.

    Raises:
      InputError: it is damaged; says how.
    """
    import orbax.checkpoint as ocp  # takes a while to import, and whoever only converts arrays does without

    with reading(folder) as checkpointer:
        has_manifest = verify_manifest(folder)
        shapes: dict[str, Any] = checkpointer.metadata(folder).item_metadata["state"].tree
        wanted = {name: part for name, part in shapes.items() if names is None or name in names}
        if not wanted:
            return {}, {}
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state_args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        items = checkpointer.restore(folder, args=ocp.args.Composite(state=state_args, about=ocp.args.JsonRestore()))
        verify_checksums(items["state"], items["about"]["checksums"])
        if not has_manifest and items["about"].get("format", 1) >= FORMAT:
            raise ValueError(f"its {MANIFEST_FILE} is missing")
        return items["state"], items["about"]


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[Any]:
    """Orbax's Checkpointer for this process alone; all that is raised meanwhile is an InputError: what is damaged."""
    import orbax.checkpoint as ocp

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
        raise InputError(f"the checkpoint '{folder}' is damaged ({in_one_sentence(reason(error))}).") from error
