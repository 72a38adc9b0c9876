"""Unpacks CIFAR-10 as JPEG files into data_local/cifar10 and cifar10.npz: python -m experiments.data ARCHIVE.tar.gz.

The archive holds train/CLASS/*.jpg and test/CLASS/*.jpg. In each class of train, every tenth image by name, from the
first on, moves to val: train keeps 45,000 images, and val gets 5,000.

cifar10.npz holds the same images in the same order, decoded: reading the files takes two to three times as long. If the
folder is there already, it is left alone, and only cifar10.npz is written.
"""

import argparse
import io
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from castling_jax.data.decode import decode
from castling_jax.data.sources import load_dataset
from castling_jax.errors import InputError, reason
from castling_jax.storage import write_atomically
from castling_jax.tools.cli import ending_in_a_sentence
from experiments.study import ROOT

CIFAR10 = ROOT / "data_local" / "cifar10"  # ignored by git
VALIDATION_EVERY = 10


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive with train/CLASS and test/CLASS into a new folder, and makes val/CLASS from train/CLASS.

    Raises:
      InputError: the folder exists, or the archive cannot be read or holds something else.
    """
    if folder.exists():
        raise InputError(f"'{folder}' exists already: remove it to unpack it anew.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, on the same disk, so that a rename moves the files.
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        try:
            with tarfile.open(archive) as file:
                file.extractall(unpacked, filter="data")
                # gzip compares its checksum at its end, which lies behind the end of the archive.
                while file.fileobj is not None and file.fileobj.read(1 << 20):
                    pass
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise InputError(f"'{archive}' cannot be unpacked ({reason(error)}).") from error
        whole = Path(unpacked, folder.name)
        whole.mkdir()
        for split in ("train", "test"):
            if not Path(unpacked, split).is_dir():
                raise InputError(f"'{archive}' has no folder {split}/.")
            shutil.move(Path(unpacked, split), whole)
        for class_folder in sorted((whole / "train").iterdir()):
            (whole / "val" / class_folder.name).mkdir(parents=True)
            for image in sorted(class_folder.iterdir())[::VALIDATION_EVERY]:
                image.rename(whole / "val" / class_folder.name / image.name)
        whole.rename(folder)  # last, so that a folder with this name is always complete


def decode_all(path: Path) -> None:
    """Writes PATH.npz, the decoded images of the folder PATH."""
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        dataset = load_dataset(f"folder:{path}", split)
        examples = [dataset[index] for index in tqdm(range(len(dataset)), desc=split, unit="image")]
        arrays[f"{split}_images"] = np.stack([np.asarray(decode(example["image"])) for example in examples])
        arrays[f"{split}_labels"] = np.array([example["label"] for example in examples], np.int32)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path.with_suffix(".npz"), content.getvalue())


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    archive = parser.parse_args().archive
    if not CIFAR10.exists():
        unpack(archive, CIFAR10)
    decode_all(CIFAR10)


if __name__ == "__main__":
    main()
