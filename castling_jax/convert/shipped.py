"""Weights that come with the package, called by a bare name such as "digits"."""

import os
from pathlib import Path

from etils import epath

from castling_jax.storage import as_path

WEIGHTS = Path(__file__).parents[1] / "weights"  # an inference folder for each name


def shipped_names() -> list[str]:
    """The sorted names of the shipped weights."""
    return sorted(path.name for path in WEIGHTS.glob("[!_]*/"))


def locate(path: str | os.PathLike) -> epath.Path:
    """The folder of shipped weights if `path` is a string and their bare name, else the path itself.

    For a folder of your own with such a name, write ./NAME or give a pathlib.Path.

    Raises:
      InputError: `path` is no path.
    """
    return epath.Path(WEIGHTS / path) if isinstance(path, str) and path in shipped_names() else as_path(path)
