"""The folders that tools write to."""

from pathlib import Path

from castling_jax.errors import InputError


def make_folder(folder: Path) -> None:
    """Makes the folder that is given by --out, where there is none, before the work whose results are to go there.

    Raises:
      InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror}): choose another folder for --out.") from error
