"""A lock's file, on a disk or in a bucket: only one process at a time can create it, take it over or remove it.

In a bucket, every change is conditional on the object's generation. On a disk, creation is exclusive, and a lock is
taken over by renaming its file first, at which only one process can succeed.
"""

import os
import secrets
from pathlib import Path
from typing import Protocol

from etils import epath

from castling_jax.storage import is_remote


def lock_file(path: epath.Path) -> "LockFile":
    """The lock's file at a path."""
    return _InBucket(path) if is_remote(path) else _OnDisk(path)


class LockFile(Protocol):
    """The file of a lock. A change takes the content that `read` returned last, and does nothing if it has changed."""

    def read(self) -> bytes | None: ...

    def create(self, content: bytes) -> bool: ...

    def take_over(self, found: bytes, content: bytes) -> bool: ...

    def refresh(self, found: bytes, content: bytes) -> None: ...

    def remove(self, found: bytes) -> None: ...


class _OnDisk:
    def __init__(self, path: epath.Path):
        self._path = Path(path)

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        try:
            file = self._path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(content)
        except OSError:  # a full disk
            self._path.unlink()
            raise
        return True

    def take_over(self, found: bytes, content: bytes) -> bool:
        aside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return False
        if aside.read_bytes() != found:  # another process has taken it over since `read`: give it back
            aside.rename(self._path)
            return False
        aside.unlink()
        return self.create(content)

    def refresh(self, found: bytes, content: bytes) -> None:
        # Written in place, not replaced: if another process is taking the lock over, this writes to the renamed file,
        # and does not put a new one in its place.
        with self._path.open("r+b") as file:
            if file.read() == found:
                file.seek(0)
                file.write(content)

    def remove(self, found: bytes) -> None:
        self._path.unlink()


class _InBucket:
    def __init__(self, path: epath.Path):
        from google.cloud import storage  # gcsfs brings it

        bucket, _, self._name = os.fspath(path).removeprefix("gs://").partition("/")
        self._bucket = storage.Client().bucket(bucket)
        self._generation = 0

    def read(self) -> bytes | None:
        from google.api_core.exceptions import NotFound

        blob = self._bucket.get_blob(self._name)
        if blob is None:
            return None
        try:
            content = blob.download_as_bytes()  # this generation's content
        except NotFound:  # the object was just replaced or removed
            return self.read()
        self._generation = blob.generation
        return content

    def create(self, content: bytes) -> bool:
        return self._write(content, 0)  # generation 0: only if there is no object

    def take_over(self, found: bytes, content: bytes) -> bool:
        return self._write(content, self._generation)

    def refresh(self, found: bytes, content: bytes) -> None:
        self._write(content, self._generation)

    def remove(self, found: bytes) -> None:
        self._bucket.blob(self._name).delete(if_generation_match=self._generation)

    def _write(self, content: bytes, generation: int) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._bucket.blob(self._name).upload_from_string(content, if_generation_match=generation)
        except PreconditionFailed:
            return False
        return True
