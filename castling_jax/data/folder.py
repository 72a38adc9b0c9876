"""Image files: with a folder for each class, in PATH/SPLIT/CLASS/ or PATH/CLASS/, or without labels, in PATH/SPLIT/ or
PATH/; and in the folders below those."""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import Bool, Int
from PIL import features

from castling_jax.errors import InputError, check, check_known, printable, refusing
from castling_jax.storage import as_path, is_remote

# If PATH contains none of these folders, in upper or lower case, its folders are the classes.
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
IMAGE_SUFFIXES: tuple[str, ...] = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
)
IMAGE_SUFFIXES += (".webp", ".avif") if features.check("avif") else (".webp",)  # Pillow reads AVIF from 11.3 on
HOLDOUT_SEED = 0


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """A split of image files without labels.

    Attributes:
      folder: the split's folder.
      files: the images' paths relative to the folder, sorted.
      skipped: suffix -> number of files with it, for suffixes that are not those of images.
    """

    annotation: ClassVar[str] = "none"

    folder: epath.Path
    files: Sequence[str]
    skipped: collections.Counter[str]

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with refusing(OSError, "the file cannot be read"):
            return {"image": (self.folder / self.files[index]).read_bytes()}

    def describe(self, index: int) -> str:
        return f"'{self.folder / self.files[index]}'"

    def contents(self) -> dict[str, str]:
        return {"file names": hash_names(self.files)}


@dataclasses.dataclass(frozen=True)
class FolderDataset(ImageFiles):
    """A split of image files with a folder for each class, whose name begins the files' paths.

    Attributes:
      labels: each file's class number.
      class_names: names of all classes.
    """

    annotation: ClassVar[str] = "label"

    labels: Int[np.ndarray, "examples"]
    class_names: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"label": int(self.labels[index])}


def hash_names(names: Iterable[str]) -> str:
    """SHA-256 of file names, which may be no UTF-8. Reading every file at each start would take too long."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()


def list_skipped(datasets: Iterable[object]) -> str:
    """How many files were skipped, by suffix, as a string, the most frequent first: "12 .txt, 1 .dng"; "" if none.

    Args:
      datasets: the splits of a data set; only image files that are found by their names have skipped any.
    """
    # Two parts of one folder count its files once.
    by_folder = {dataset.folder: dataset.skipped for dataset in datasets if isinstance(dataset, ImageFiles)}
    skipped = sum(by_folder.values(), collections.Counter[str]())
    return ", ".join(f"{count:,} {printable(suffix)}" for suffix, count in skipped.most_common())


def data_root(path: epath.PathLike) -> epath.Path:
    """The folder of a data set.

    Raises:
      InputError: there is no such folder.
    """
    root = as_path(path, "the folder of a data set")
    if not root.is_dir():
        raise InputError(f"there is no folder '{root}'.")
    return root


def folder_splits(path: epath.PathLike) -> list[str]:
    """The splits of a folder of images: the folders in it, or only "train" if those are the classes.

    Raises:
      InputError: there is no such folder.
    """
    root = data_root(path)
    folders = _folders(root)
    return folders if {name.lower() for name in folders} & set(SPLIT_NAMES) or not folders else ["train"]


def folder(path: epath.PathLike, split: str, classes: Sequence[str] | None = None) -> FolderDataset:
    """The images in PATH/SPLIT/CLASS/ and in the folders below it, in sorted order.

    The folders in PATH/train, sorted, are the classes, so that a label means the same in every split. If no folder in
    PATH is named like a split, the folders in PATH are the classes, and "train" is all their images.

    Args:
      path: the folder PATH.
      split: a folder in PATH; or "10% of train", a tenth of each class, always the same images because the seed is
        fixed; or "train without 10%", the other images.
      classes: the classes of a model that was trained elsewhere, in its order. PATH/train is then not needed.

    Raises:
      InputError: a folder is missing, has no classes or no images (a class may be empty, except in train), or has a
        class that PATH/train or `classes` lacks.
    """
    splits = folder_splits(path)
    root = as_path(path)
    name, *_ = parse_split(split)
    if classes is None and "train" not in splits:
        has = f" (it has {', '.join(map(repr, splits[:5]))})" if splits else ""
        raise InputError(f"'{root}' has no folder 'train', whose folders would be the classes{has}.")
    if name in _folders(root):
        train, images = root / "train", root / name
    else:
        check_known(f"split of '{root}'", name, splits)
        train = images = root
    known = _folders(train) if classes is None else list(classes)
    if not known:
        raise InputError(f"'{train}' holds no folders, one for the images of each class.")
    files: list[str] = []
    labels: list[int] = []
    skipped: collections.Counter[str] = collections.Counter()
    for class_name in _folders(images):
        if class_name not in known:
            lacks = f"for which '{train}' has no folder" if classes is None else "that the model does not have"
            raise InputError(f"'{images / class_name}' is a class {lacks}.")
        # Sorted: the order in which a file system lists files differs between machines, and a split must not.
        class_files = sorted(image_files(images / class_name, f"{class_name}/", skipped))
        # A class without images to learn from is a mistake; a held-out split may lack a rare class.
        if not class_files and name == "train":
            raise InputError(f"'{images / class_name}' holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        files += class_files
        labels += [known.index(class_name)] * len(class_files)
    if not files:
        raise InputError(f"'{images}' holds no folders, one for the images of each class.")
    indices = choose(np.array(labels), split, root)
    split_files = [files[index] for index in indices]
    return FolderDataset(images, split_files, skipped, np.array(labels, np.int32)[indices], tuple(known))


def images_splits(path: epath.PathLike) -> list[str]:
    """The splits of a folder of images without labels: its folders that are named like splits, or only "train".

    Raises:
      InputError: there is no such folder.
    """
    root = data_root(path)
    return [name for name in _folders(root) if name.lower() in SPLIT_NAMES] or ["train"]


def images(path: epath.PathLike, split: str, classes: Sequence[str] | None = None) -> ImageFiles:
    """The images in and below PATH/SPLIT, in sorted order; the folders' names mean nothing.

    If no folder in PATH is named like a split, "train" is all images in and below PATH.

    Args:
      path: the folder PATH.
      split: as in `folder`; a held-out part is of all images.
      classes: there are none, so this is not used.

    Raises:
      InputError: a folder is missing or has no images.
    """
    splits, root = images_splits(path), as_path(path)
    name, *_ = parse_split(split)
    check_known(f"split of '{root}'", name, splits)
    where = root / name if name in _folders(root) else root
    skipped: collections.Counter[str] = collections.Counter()
    files = sorted(image_files(where, "", skipped))
    if not files:
        raise InputError(f"the split {split!r} of '{root}' holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    chosen = [files[index] for index in choose(np.zeros(len(files), np.int32), split, root)]
    return ImageFiles(where, chosen, skipped)


def image_files(path: epath.Path, prefix: str, skipped: collections.Counter[str]) -> Iterator[str]:
    """Yields the relative paths of the images in and below a folder, after `prefix`; counts other files in `skipped`.

    In a bucket, a name with an image's suffix is assumed to be a file, because each check takes a request.
    """
    remote = is_remote(path)
    # os.scandir knows which entries are folders without asking the disk about each of a million files.
    for entry in path.iterdir() if remote else os.scandir(path):
        if entry.name.startswith("."):
            continue
        is_named_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
        if is_named_image and (remote or not entry.is_dir()):
            yield prefix + entry.name
        elif entry.is_dir():
            yield from image_files(path / entry.name, f"{prefix}{entry.name}/", skipped)
        else:
            skipped[PurePath(entry.name).suffix.lower() or "no suffix"] += 1


def read_list(path: epath.Path) -> list[str]:
    """The names in a text file that has one a line; empty lines are passed over.

    Raises:
      InputError: the file cannot be read, or has a name twice.
    """
    with refusing((OSError, ValueError), f"'{path}' cannot be read"):
        text = path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
    names = [line.strip() for line in text.splitlines() if line.strip()]
    for name, count in collections.Counter(names).items():
        check(count == 1, f"'{path}' lists {name!r} {count} times, and it may list a name once.")
    return names


def rest_of(split: str) -> str | None:
    """The split that remains: "train without 10%" for "10% of train"; None for a split that is not part of another."""
    name, percent, is_held_out = parse_split(split)
    return f"{name} without {percent}%" if is_held_out else None


def parse_split(split: str) -> tuple[str, int | None, bool]:
    """(folder, percentage that is held out of it or None, whether the split is the held-out part)."""
    if match := re.fullmatch(r"([1-9]\d?)% of (.+)", split):
        return match[2], int(match[1]), True
    if match := re.fullmatch(r"(.+) without ([1-9]\d?)%", split):
        return match[1], int(match[2]), False
    return split, None, False


def choose(labels: Int[np.ndarray, "examples"], split: str, root: epath.PathLike) -> Int[np.ndarray, "chosen_examples"]:
    """The indices of a split's examples among those of the folder or file that it is a part of.

    Args:
      labels: the class of each example; the percentage is of each class.
      split: the split, as `parse_split` takes it.
      root: the data set, for the message.

    Raises:
      InputError: there is no example.
    """
    name, percent, is_held_out = parse_split(split)
    chosen = np.arange(len(labels))
    if percent is not None:
        chosen = chosen[_held_out(labels, percent) == is_held_out]
    if not len(chosen):
        few = f": each class of {name} has too few to hold out {percent} % of them, so give another config.dataset."
        raise InputError(
            f"the split {split!r} of '{root}' holds no images" + (few + "eval_split." if len(labels) else ".")
        )
    return chosen


def _held_out(labels: Int[np.ndarray, "examples"], percent: int) -> Bool[np.ndarray, "examples"]:
    """Which examples are held out: this percentage of each class, rounded, but at least one and never all of them."""
    is_held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * percent / 100), 1), len(members) - 1)
        # A generator for each class: new images in one class do not change which images of another are held out.
        order = np.random.default_rng((HOLDOUT_SEED, int(label))).permutation(len(members))
        is_held_out[members[order[:count]]] = True
    return is_held_out


def _folders(path: epath.Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir())
