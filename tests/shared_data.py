"""Real data that the tests read where it is there; nothing in the package needs it."""

import os
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("CASTLING_JAX_DATA", Path(__file__).parents[2] / "shared" / "data"))


def unpack(name, folder):
    """Unpacks an archive into a folder, and returns it; skips the test where there is no such archive."""
    archive = FOLDER / name
    if not archive.is_file():
        pytest.skip(f"there is no {archive}: CASTLING_JAX_DATA may name its folder")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder
