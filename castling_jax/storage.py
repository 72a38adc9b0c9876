"""Files and folders on this machine's disks and in buckets (gs://)."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from castling_jax.errors import InputError, reason


def as_path(path: str | os.PathLike, what: str = "a path") -> epath.Path:
    """A path as a person gives it, with ~ for the home folder; every path from outside comes through here.

    Args:
      path: on this machine, or in a bucket.
      what: what the path is of, for the message.

    Raises:
      InputError: it is no text and no path, it is empty, or it holds a null character.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise InputError(f"{what} must be a text or a path, not {path!r}.")
    if not text:
        raise InputError(f"{what} must not be empty; the folder one stands in is '.'.")
    if "\0" in text:
        raise InputError(f"{what} must not hold a null character, as {text!r} does.")
    # os.path's leaves ~NOBODY as it is.
    return epath.Path(text if is_remote(text) else os.path.expanduser(text))  # noqa: PTH111


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a bucket's, such as gs://, and not a folder of this machine."""
    return "://" in os.fspath(path)


def reach_bucket(path: str | os.PathLike, *, for_a_run: bool = False) -> None:
    """Refuses a path in a bucket that is out of reach.

    Args:
      path: of any kind; one on this machine is not looked at.
      for_a_run: whether a run is to be kept there; Orbax asks for the bucket's description before it deletes a
        checkpoint, hours later, so it is asked for here.

    Raises:
      InputError: the package for buckets is not installed, there is no such bucket, or there is no way to it.
    """
    if not is_remote(path):
        return
    bucket = "/".join(os.fspath(path).split("/")[:3])
    try:
        is_there = epath.Path(bucket).exists()
        if is_there and for_a_run:
            from google.cloud import storage  # gcsfs brings it

            storage.Client().get_bucket(bucket.removeprefix("gs://"))
    except ImportError:
        raise InputError(f"'{path}' is in a bucket, which takes gcsfs: pip install gcsfs.") from None
    except Exception as error:  # gcsfs, google.auth and aiohttp raise many kinds
        raise InputError(
            f"the bucket '{bucket}' cannot be reached ({reason(error)}); is there a network, and is this machine or "
            "person logged in (gcloud auth application-default login) and allowed storage.buckets.get?"
        ) from error
    if not is_there:
        raise InputError(f"there is no bucket '{bucket}', or nothing in it may be seen.")


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """A copy on this machine, while the block lasts, of a bucket's file or folder; what refuses it names the bucket's.

    Raises:
      InputError: what `reach_bucket` raises. Where there is nothing at `path`, there is nothing at the copy's.
    """
    reach_bucket(path)
    source = epath.Path(path)
    with tempfile.TemporaryDirectory() as here:
        copy = epath.Path(here) / source.name
        if source.is_dir():
            copy_folder(source, copy)
        elif source.exists():
            source.copy(copy)
        try:
            yield Path(copy)
        except InputError as error:
            raise InputError(str(error).replace(here, os.fspath(source.parent))) from error


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root, as Orbax wants it. A bucket's is one, and epath would set the working directory first."""
    return path if is_remote(path) else path.absolute()


def copy_folder(source: epath.Path, target: epath.Path, *, last: str | None = None) -> None:
    """Copies a folder's files into another; the file named `last` after all others, as the mark of a whole folder."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def try_folder(folder: str | os.PathLike) -> None:
    """Tries to make a folder and a file in it, before the work whose results are to go there; leaves nothing behind.

    A bucket's is left to `reach_bucket`.

    Raises:
      InputError: there is a file in the folder's place or above it, or nothing can be made or written there.
    """
    if is_remote(folder):
        return
    path = Path(folder).absolute()
    made: list[Path] = []
    try:
        for part in (*reversed(path.parents), path):
            if os.path.lexists(part) and not part.is_dir():
                where = "" if part == path else f"'{folder}' cannot be made: "
                what = "is a file" if part.exists() else "is a link that leads nowhere"
                raise InputError(f"{where}'{part if where else folder}' {what}, and a folder is needed there.")
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"a byte, for which a full disk has no place")
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written to ({error.strerror or error}): choose another.") from error
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):  # another process may have put something into it
                part.rmdir()


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


def try_file(path: str | os.PathLike) -> None:
    """Tries whether a file can be written or replaced, before the work whose results are to go there.

    Raises:
      InputError: it is a folder, or its folder cannot be written to.
    """
    if is_remote(path):
        return
    try_folder(Path(path).parent)
    if Path(path).is_dir():
        raise InputError(f"'{path}' is a folder, and a file is to be written there.")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise InputError(f"'{path}' cannot be written to ({os.strerror(errno.EACCES)}).")


def remove(path: Path | epath.Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        epath.Path(path).rmtree()
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's names and files in their order."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {sha256_of(file_path)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file so that a reader, or a run killed meanwhile, sees the old content or the new, never a part."""
    if is_remote(path):
        path.write_bytes(data)  # an object is replaced as a whole
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
