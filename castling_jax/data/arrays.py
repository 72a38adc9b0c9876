"""Labelled images in memory, and the NumPy archives that hold them.

An archive FILE.npz has MedMNIST's layout (Yang et al. 2023): for each split, an array SPLIT_images and an array
SPLIT_labels, such as train_images and train_labels.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from castling_jax.data.folder import choose, parse_split
from castling_jax.errors import InputError, check_known, refusing
from castling_jax.storage import as_path

IMAGES, LABELS = "_images", "_labels"  # what follows a split's name in an archive
LARGEST_LABEL = 2**15  # a larger one is an identifier, not a class


def numbers(count: int) -> tuple[str, ...]:
    """Names for classes that have none: their numbers."""
    return tuple(map(str, range(count)))


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """Labelled images in memory: uint8, or floats in [0, 1].

    Every model takes every data set, so an image always has three channels; a grey image repeats its channel.
    """

    annotation = "label"

    images: Float[np.ndarray, "examples height width channels"] | UInt8[np.ndarray, "examples height width channels"]
    labels: Int[np.ndarray, "examples"]
    num_classes: int

    @property
    def classes(self) -> tuple[str, ...]:
        return numbers(self.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if image.shape[2] == 1:  # here, not in the archive's array, which would take three times the memory
            image = np.broadcast_to(image, (*image.shape[:2], 3))
        return {"image": image, "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return f"image {index}"

    def contents(self) -> dict[str, str]:
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return {"images and labels": digest.hexdigest()}


def npz_splits(path: epath.PathLike) -> list[str]:
    """The splits of an archive: those that have images and labels.

    Raises:
      InputError: the file is missing or damaged, or is no such archive.
    """
    archive = as_path(path, "the archive of a data set")
    with _reading(archive) as arrays:
        names = list(arrays)
    splits = [name.removesuffix(IMAGES) for name in names if name.endswith(IMAGES)]
    splits = [split for split in splits if split and split + LABELS in names]
    if not splits:
        raise InputError(f"'{archive}' must hold arrays train_images and train_labels, but it holds {names}.")
    return splits


def npz(path: epath.PathLike, split: str, classes: Sequence[str] | None = None) -> ArrayDataset:
    """The images and labels of a split of an archive, in its order. The classes are numbers.

    Args:
      path: the archive.
      split: one of `npz_splits`; or a part of one, such as "10% of train" or "train without 10%", as in `folder`.
      classes: the classes of a model that was trained elsewhere. None counts them: one more than the largest label of
        train.

    Raises:
      InputError: as `npz_splits` does; the split is unknown or empty; images are not uint8 [examples, height, width] or
        [examples, height, width, 1 or 3]; or labels are not one number of a class for each image.
    """
    name, *_ = parse_split(split)
    # A class that train lacks cannot be learned, so train's labels say how many there are.
    counted = "train" if classes is None else name
    splits = npz_splits(path)
    for needed in (name, counted):
        check_known(f"split of '{path}'", needed, splits)
    with _reading(as_path(path)) as arrays:
        images = np.asarray(arrays[name + IMAGES])  # NumPy gives bytes for a file in the archive that is no array
        labels = {key: np.asarray(arrays[key + LABELS]) for key in {name, counted}}
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise InputError(
            f"{name}{IMAGES} of '{path}' must be uint8 [images, height, width], or with 1 or 3 channels, not "
            f"{images.dtype} {list(images.shape)}."
        )
    if not images.size:
        raise InputError(f"{name}{IMAGES} of '{path}' holds no pixels: its shape is {list(images.shape)}.")
    checked = {key: _class_numbers(key + LABELS, values, path) for key, values in labels.items()}
    own = checked[name]
    if len(own) != len(images):
        raise InputError(f"'{path}' has {len(images):,} {name}{IMAGES}, but {len(own):,} {name}{LABELS}.")
    num_classes = int(checked[counted].max()) + 1 if classes is None else len(classes)
    if own.max() >= num_classes:
        raise InputError(f"{name}{LABELS} of '{path}' has the class {own.max()}, but there are {num_classes}.")
    kept = choose(own, split, path)
    if len(kept) < len(images):  # a whole split stays the archive's own array: choosing all rows would copy them
        images, own = images[kept], own[kept]
    return ArrayDataset(images if images.ndim == 4 else images[..., None], own, num_classes)


@contextlib.contextmanager
def _reading(archive: epath.Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens an archive; its arrays are read when they are asked for, inside the block."""
    # NumPy's readers and zipfile's raise all kinds for files that are missing, damaged or of another format.
    with refusing(Exception, f"'{archive}' cannot be read as an .npz file"), archive.open("rb") as file:
        arrays = np.load(file)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        yield arrays


def _class_numbers(name: str, labels: np.ndarray, path: epath.PathLike) -> Int[np.ndarray, "examples"]:
    """The labels as int32, one for each image; MedMNIST's have a second axis of length 1."""
    is_one_each = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if labels.dtype.kind not in "iu" or not is_one_each or not labels.size:
        raise InputError(
            f"{name} of '{path}' must be the number of one class for each image, not {labels.dtype} "
            f"{list(labels.shape)}."
        )
    if not 0 <= labels.min() <= labels.max() <= LARGEST_LABEL:
        raise InputError(
            f"{name} of '{path}' must be from 0 to {LARGEST_LABEL:,}, not from {labels.min()} to {labels.max()}."
        )
    return labels.reshape(-1).astype(np.int32)
