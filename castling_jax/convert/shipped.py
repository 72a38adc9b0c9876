"""Weights that come with the package, called by a bare name such as "digits"."""

import os
from pathlib import Path

from etils import epath

from castling_jax.storage import as_path

WEIGHTS = Path(__file__).parents[1] / "weights"  # an inference folder for each name


def shipped_names() -> list[str]:
    """The names, sorted."""
    return sorted(path.name for path in WEIGHTS.glob("[!_]*/"))


def locate(path: str | os.PathLike) -> epath.Path:
    """Where `path` leads: to the folder of shipped weights if it is a text and their bare name, else where it says.

    A folder of one's own that has such a name is called ./NAME, or given as a pathlib.Path.

    Raises:
      InputError: it is no path at all.
    """
    return epath.Path(WEIGHTS / path) if isinstance(path, str) and path in shipped_names() else as_path(path)
