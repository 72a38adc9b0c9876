"""The folders that tools write to, and how a tool ends that cannot go on."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from castling_jax.errors import InputError, refusing_os_errors
from castling_jax.storage import as_path, try_folder


def any_path(text: str) -> epath.Path:
    """argparse's type of a path, in a bucket too; ~ is the home folder."""
    try:
        return as_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """argparse's type of a path on this machine; ~ is the home folder."""
    return Path(any_path(text))


def make_folder(folder: Path) -> None:
    """Makes the folder that is given by --out, where there is none, before the work whose results are to go there.

    Raises:
      InputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror}): choose another folder for --out.") from error
    try_folder(folder)


@contextlib.contextmanager
def ending_in_a_sentence(prefix: str = "") -> Iterator[None]:
    """Ends the process with status 1 and a sentence where the block raises an InputError or the system's error.

    A reader that left, as in `TOOL | head`, is no mistake.
    """
    try:
        with refusing_os_errors():
            yield
            sys.stdout.flush()
    except InputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at the end fails too
            sys.exit(0)
        sys.exit(f"{prefix}{error}")
