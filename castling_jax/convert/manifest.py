"""A checkpoint's manifest: the SHA-256 of its files, in the format that sha256sum writes and checks.

The bytes of arrays, which are nearly all, are left out: their checksums are computed where the arrays lie, before they
are written and after they are read. What is here is all that says how to read them, and what was saved beside them.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from castling_jax.storage import write_atomically

MANIFEST_FILE = "SHA256SUMS"
ARRAYS = "d"  # the name of TensorStore's folders of the arrays' bytes
# Orbax writes these behind the manifest, to mark that a checkpoint is whole. Nothing that is restored is in them.
MARKS = (MANIFEST_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
THREADS = 16  # a bucket answers after some 50 ms, and a checkpoint has some small files for each host


def write_manifest(folder: epath.Path) -> None:
    """Writes FOLDER/SHA256SUMS, once all else is written."""
    lines = (f"{digest}  {name}\n" for name, digest in _digests(folder).items())
    write_atomically(folder / MANIFEST_FILE, "".join(lines).encode())


def verify_manifest(folder: epath.Path, part: str = "") -> bool:
    """Holds a checkpoint's files against its manifest.

    Args:
      folder: of the checkpoint.
      part: the start of the names that are looked at; "" is all.

    Returns:
      Whether there is a manifest: an earlier version wrote none.

    Raises:
      ValueError: a file is not as it was written, missing, or was not there.
      OSError: it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return False
    lines = (line.split("  ", maxsplit=1) for line in path.read_text().splitlines())
    expected = {name: digest for digest, name in lines if name.startswith(part)}
    found = _digests(folder, part)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name} is not as {MANIFEST_FILE} has it")
    return True


def _digests(folder: epath.Path, part: str = "") -> dict[str, str]:
    names = [name for name in _names(folder) if name.startswith(part)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest(), names)
        return dict(zip(names, digests, strict=True))


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Of the files that a manifest is of, sorted."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.is_dir():
            if path.name != ARRAYS:
                yield from _names(path, f"{name}/")
        elif name not in MARKS:
            yield name
