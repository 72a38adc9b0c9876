"""A checkpoint's manifest: the SHA-256 of its files, in the format that sha256sum writes and checks.

The arrays' bytes, nearly the whole checkpoint, are left out: checksums.py checks the arrays on the devices. The
manifest covers the files that say how to read the arrays, and the JSON files beside them.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from castling_jax.storage import write_atomically

MANIFEST_FILE = "SHA256SUMS"
ARRAYS = "d"  # TensorStore's name for folders with the bytes of arrays
# The manifest itself, and the files that Orbax writes after it to mark a checkpoint as complete; no state is in them.
MARKS = (MANIFEST_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
THREADS = 16  # a bucket takes about 50 ms to answer, and a checkpoint has several small files for each host


def write_manifest(folder: epath.Path) -> None:
    """Writes FOLDER/SHA256SUMS; to be called when all other files are written."""
    lines = (f"{digest}  {name}\n" for name, digest in _digests(folder).items())
    write_atomically(folder / MANIFEST_FILE, "".join(lines).encode())


def verify_manifest(folder: epath.Path, part: str = "") -> bool:
    """Checks a checkpoint's files against its manifest.

    Args:
      folder: the checkpoint's folder.
      part: only files whose names start with it are checked; "" checks all.

    Returns:
      Whether there is a manifest; earlier versions wrote none.

    Raises:
      ValueError: a file has changed, is missing, or is not in the manifest.
      OSError: a file cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return False
    lines = (line.split("  ", maxsplit=1) for line in path.read_text().splitlines())
    expected = {name: digest for digest, name in lines if name.startswith(part)}
    digests = _digests(folder, part)
    for name in sorted(expected.keys() | digests.keys()):
        if expected.get(name) != digests.get(name):
            raise ValueError(f"{name} is not as {MANIFEST_FILE} has it")
    return True


def _digests(folder: epath.Path, part: str = "") -> dict[str, str]:
    names = [name for name in _names(folder) if name.startswith(part)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest(), names)
        return dict(zip(names, digests, strict=True))


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the sorted names of the files that a manifest covers."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.is_dir():
            if path.name != ARRAYS:
                yield from _names(path, f"{name}/")
        elif name not in MARKS:
            yield name
