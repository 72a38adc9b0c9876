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
    """Checks a path that a user gave, and expands ~ to the home folder; every path from outside comes through here.

    Args:
      path: a path on this machine or in a bucket.
      what: what the path leads to, used in the message.

    Raises:
      InputError: it is neither text nor a path, it is empty, it contains a null character, or it is in another place
        than this machine or a gs:// bucket.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise InputError(f"{what} must be a string or a path, not {path!r}.")
    if not text:
        raise InputError(f"{what} must not be empty; the current folder is '.'.")
    if "\0" in text:
        raise InputError(f"{what} must not hold a null character, as {text!r} does.")
    if is_remote(text) and not text.startswith("gs://"):
        raise InputError(f"{what} must be on this machine or in a bucket (gs://), not {text!r}.")
    # os.path leaves the ~NAME of an unknown user as it is, where pathlib raises.
    return epath.Path(text if is_remote(text) else os.path.expanduser(text))  # noqa: PTH111


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, such as gs://, and not on this machine."""
    return "://" in os.fspath(path)


def reach_bucket(path: str | os.PathLike, *, for_a_run: bool = False) -> None:
    """Refuses a path in a bucket that cannot be reached.

    Args:
      path: any path; a path on this machine is not checked.
      for_a_run: whether a run will be kept there. Orbax reads the bucket's description before it deletes a checkpoint,
        hours into the run, so this function reads it at the start.

    Raises:
      InputError: the package for buckets is not installed, there is no such bucket, or it cannot be reached.
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
        raise InputError(f"'{path}' is in a bucket, which needs gcsfs: pip install gcsfs.") from None
    except Exception as error:  # gcsfs, google.auth and aiohttp raise many kinds
        raise InputError(
            f"the bucket '{bucket}' cannot be reached ({reason(error)}); is there a network, and is this machine or "
            "person logged in (gcloud auth application-default login) and allowed storage.buckets.get?"
        ) from error
    if not is_there:
        raise InputError(f"there is no bucket '{bucket}', or its content may not be listed.")


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Copies a bucket's file or folder to this machine for the length of the block.

    An InputError raised inside the block names the bucket's path in place of the copy's. If nothing is at `path`,
    nothing is at the copy's path either.

    Raises:
      InputError: `reach_bucket` refuses the path.
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
    """The absolute path, which Orbax needs. A bucket's path already is; epath would prefix the working directory."""
    return path if is_remote(path) else path.absolute()


def copy_folder(source: epath.Path, target: epath.Path, *, last: str | None = None) -> None:
    """Copies a folder's files into another folder; the file named `last` comes last, to mark the folder as complete."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):  # False sorts before True
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def try_folder(folder: str | os.PathLike) -> None:
    """Tests, before the work begins, that its results can be written to a folder; leaves nothing behind.

    A folder in a bucket is not tested here, but by `reach_bucket`.

    Raises:
      InputError: a file is in the place of the folder or of one above it, or nothing can be created or written there.
    """
    if is_remote(folder):
        return
    path = Path(folder).absolute()
    created: list[Path] = []
    try:
        # From the root down, so that the message names the first part of the path that stands in the way.
        for part in (*reversed(path.parents), path):
            if os.path.lexists(part) and not part.is_dir():
                where = "" if part == path else f"'{folder}' cannot be made: "
                what = "is a file" if part.exists() else "is a link that leads nowhere"
                raise InputError(f"{where}'{part if where else folder}' {what}, and a folder is needed there.")
            if not part.exists():
                part.mkdir()
                created.append(part)
        # Bytes are written too: on a full disk an empty file can still be created.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"a byte, for which a full disk has no place")
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written to ({error.strerror or error}): choose another.") from error
    finally:
        for part in reversed(created):
            with contextlib.suppress(OSError):  # another process may have put something into it
                part.rmdir()


def make_folder(folder: Path) -> None:
    """Creates the folder given by --out, if need be, before the work whose results will go there.

    Raises:
      InputError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror}): choose another folder for --out.") from error
    try_folder(folder)


def try_file(path: str | os.PathLike) -> None:
    """Tests, before the work begins, that its result can be written to a file.

    Raises:
      InputError: the path is a folder, or the file or its folder cannot be written to.
    """
    if is_remote(path):
        return
    try_folder(Path(path).parent)
    if Path(path).is_dir():
        raise InputError(f"'{path}' is a folder, but a file has to be written there.")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise InputError(f"'{path}' cannot be written to ({os.strerror(errno.EACCES)}).")


def remove(path: Path | epath.Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        epath.Path(path).rmtree()
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's sorted file names and their SHA-256."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {sha256_of(file_path)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file in one step: a reader finds the old content or the new, never a part, even after a kill."""
    if is_remote(path):
        path.write_bytes(data)  # an object is replaced as a whole
        return
    # In the same folder: a rename is atomic only within one file system. With the process's number: two may write.
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
