"""Images that are annotated with masks: ROOT/SPLIT has images, ROOT/SPLIT_labels a PNG of labels for each of them."""

import collections
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from castling_jax.data.decode import Size, decoding, image_size
from castling_jax.data.folder import choose, data_root, hash_names, image_files, parse_split, read_list
from castling_jax.errors import InputError, about, check, check_at_most, check_known, refusing
from castling_jax.storage import as_path

IGNORED = 255  # the label of a pixel without a class, whatever number the files have for it
INVALID = 254  # what a table of labels has for a number that is not a class
MOST_CLASSES = 254
LABELS = "_labels"  # ends the name of a split's folder of masks
CLASSES_FILE = "classes.txt"
THREADS = 8
Labels = UInt8[np.ndarray, "height width"]
Table = UInt8[np.ndarray, "256"]
T = TypeVar("T")


class MaskedImages(Protocol):
    """A data set of masks; `mask` reads one without its image."""

    def __len__(self) -> int: ...

    @property
    def table(self) -> Table:
        """The class of each number in the files, or IGNORED, or INVALID."""

    def mask(self, index: int) -> bytes:
        """An encoded mask. Raises an InputError if it cannot be read."""


@dataclasses.dataclass(frozen=True)
class MaskDataset:
    """Image files, and a PNG of labels for each.

    Attributes:
      folder: the folder that holds the images.
      files: the images' paths, relative to the folder, sorted.
      masks: the masks' paths, relative to the folder with LABELS after its name.
      classes: names of the classes.
      table: the class of each number in the files, or IGNORED, or INVALID.
    """

    annotation = "mask"

    folder: epath.Path
    files: Sequence[str]
    masks: Sequence[str]
    classes: tuple[str, ...]
    table: Table

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with refusing(OSError, "the file cannot be read"):
            image = (self.folder / self.files[index]).read_bytes()
        return {"image": image, "mask": self.mask(index), "table": self.table}

    def mask(self, index: int) -> bytes:
        with refusing(OSError, "the mask cannot be read"):
            return (_labels_folder(self.folder) / self.masks[index]).read_bytes()

    def describe(self, index: int) -> str:
        return f"'{self.folder / self.files[index]}'"

    def contents(self) -> dict[str, str]:
        return {"file names": hash_names([*self.files, *self.masks])}


def masks_splits(path: epath.PathLike) -> list[str]:
    """The splits in a folder: the folders beside which there is one of the same name with LABELS after it.

    Raises:
      InputError: there is no such folder.
    """
    root = data_root(path)
    names = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return sorted(name for name in names if name + LABELS in names)


def masks(
    path: epath.PathLike,
    split: str,
    classes: Sequence[str] | None = None,
    *,
    ignore_label: int = IGNORED,
    first_label: int = 0,
) -> MaskDataset:
    """The images in PATH/SPLIT, whose labels are in PATH/SPLIT_labels, in PNGs of the same stem; sorted.

    A pixel's number is its class, from `first_label`. PATH/classes.txt has the classes' names, one a line. Without the
    file the names are the numbers from 0 up to the largest class of the split "train", whose masks are then all read.

    Args:
      path: the data set's root folder.
      split: one of `masks_splits`; or a part of one, such as "10% of train" or "train without 10%", as in `folder`.
      classes: names of a model's classes, in the order of its outputs. The classes in classes.txt are found among them
        by name; without the file, numbers are the places in this list.
      ignore_label: the number of pixels without a class.
      first_label: the first class's number; smaller numbers are pixels without a class.

    Raises:
      InputError: a folder is missing or empty, an image has no mask or a mask no image, the first mask has colours
        instead of numbers, there are too many classes or one that `classes` lacks, or `ignore_label` is a class's.
    """
    root = as_path(path, "the folder of a data set")
    name, *_ = parse_split(split)
    splits = masks_splits(path)
    if not splits:
        raise InputError(f"'{root}' has no folder {name!r} with a folder {name + LABELS!r} beside it, for the masks.")
    check_known(f"split of '{root}'", name, splits)
    pairs = _pairs(root / name)
    # `choose` draws a share from each class of images. Images with masks have no class, so all count as class 0.
    chosen = [pairs[index] for index in choose(np.zeros(len(pairs), np.int32), split, root)]
    numbers = table_of(range(MOST_CLASSES - first_label), ignore_label, first=first_label)
    dataset = _mask_dataset(root / name, chosen, numbers)
    check_not_coloured(dataset)
    names = read_list(root / CLASSES_FILE) if (root / CLASSES_FILE).exists() else None
    check(names != [], f"'{root / CLASSES_FILE}' lists no class: it needs a name for each, one a line.")
    if names is None and classes is None:
        # The classes must be the same in every split.
        train = root / "train" if "train" in splits else root / name
        names = numbers_in(_mask_dataset(train, _pairs(train), numbers))
    names = list(classes or ()) if names is None else names
    known = names if classes is None else list(classes)
    for class_name in names:
        if class_name not in known:
            raise InputError(f"'{root / CLASSES_FILE}' has the class {class_name!r}, which the model does not have.")
    table = table_of(map(known.index, names), ignore_label, first=first_label)
    if first_label <= ignore_label < first_label + len(names):
        class_name = names[ignore_label - first_label]
        raise InputError(f"config.dataset.ignore_label = {ignore_label} is the number of the class {class_name!r}.")
    return dataclasses.replace(dataset, classes=tuple(known), table=table)


def decode_mask(mask: bytes) -> Labels:
    """The numbers in a mask's PNG of up to 8 bits, grey or with a palette, whose colours are not looked at.

    Raises:
      InputError: the mask cannot be decoded, is no PNG, or has colours or more than 8 bits.
    """
    with decoding("the mask"):
        opened = Image.open(io.BytesIO(mask))
    _check_mode(opened)
    with decoding("the mask"):
        numbers = np.asarray(opened).astype(np.uint8)
    bits = mask[24]  # of a number; the byte's place in a PNG's header is fixed
    # Pillow stretches grey numbers of 2 and 4 bits to 0 to 255.
    return numbers // (255 // (2**bits - 1)) if opened.mode == "L" else numbers


def read_labels(example: dict[str, Any], size: Size) -> Labels:
    """The class of each pixel of an example, or IGNORED.

    Args:
      example: an example of a data set of masks.
      size: (height, width) of its image.

    Raises:
      InputError: the mask cannot be decoded, has another size than the image, or has a number that is no class.
    """
    numbers = decode_mask(example["mask"])
    if numbers.shape != size:
        found = f"{numbers.shape[1]} x {numbers.shape[0]}"
        raise InputError(f"the mask has {found} pixels, but its image has {size[1]} x {size[0]}.")
    labels = example["table"][numbers]
    if (labels == INVALID).any():
        number, known = numbers[labels == INVALID][0], np.flatnonzero(example["table"] < INVALID)
        raise InputError(
            f"the mask has the label {number}, but the classes have the labels {known.min()} to {known.max()}: set "
            f"config.dataset.ignore_label = {number} if {number} means no class, config.dataset.first_label to the "
            "first class's number, or add the missing names to classes.txt."
        )
    return labels


def table_of(classes: Iterable[int], ignore_label: int = IGNORED, *, first: int = 0) -> Table:
    """What each number in a mask stands for: a class, IGNORED or INVALID.

    Args:
      classes: the classes of the numbers `first`, `first` + 1, ...
      ignore_label: the number of pixels without a class.
      first: the first class's number; smaller numbers are pixels without a class.

    Raises:
      InputError: there are too many classes.
    """
    listed = list(classes)
    check_at_most("the number of classes", len(listed), MOST_CLASSES - first, "what masks of 8 bits have room for")
    table = np.full(256, INVALID, np.uint8)
    table[:first] = IGNORED
    table[first : first + len(listed)] = listed
    table[ignore_label] = IGNORED
    return table


def numbers_in(dataset: MaskedImages) -> list[str]:
    """Names for the classes of masks that have none: the numbers from 0 to the largest one.

    All masks are read; those that cannot be decoded are passed over.

    Raises:
      InputError: no mask has any class.
    """

    def largest(mask: bytes) -> int:
        labels = dataset.table[decode_mask(mask)]
        return max(map(int, np.unique(labels[labels < INVALID])), default=-1)

    found = max(_of_each(largest, dataset), default=-1)
    if found < 0:
        raise InputError(f"none of the {len(dataset):,} masks has a pixel with a class.")
    return list(map(str, range(found + 1)))


def sizes_of(dataset: MaskedImages) -> list[Size]:
    """(height, width) of each mask, by its header; damaged ones are passed over."""
    return _of_each(image_size, dataset)


def has_labels(dataset: MaskedImages) -> bool:
    """Whether any pixel of any mask has a class; masks are read until one does."""
    for index in range(len(dataset)):
        with contextlib.suppress(InputError):  # a damaged mask, which an evaluation leaves out
            if (dataset.table[decode_mask(dataset.mask(index))] < INVALID).any():
                return True
    return False


def check_not_coloured(dataset: MaskedImages) -> None:
    """Raises an InputError if the first mask has colours: then all have, and no image could be read."""
    with contextlib.suppress(OSError), about("the first mask"):
        _check_mode(Image.open(io.BytesIO(dataset.mask(0))))


def _check_mode(opened: Image.Image) -> None:
    if opened.format != "PNG":
        raise InputError(f"the file is a {opened.format}, and masks are PNGs: a JPEG, for one, changes the numbers.")
    if opened.mode not in ("1", "L", "P"):
        kind = "numbers of 16 bits or more" if opened.mode[0] in "IF" else "colours and not numbers of classes"
        raise InputError(f"the pixels are {kind}: write masks of 8 bits, as docs/howto/segmentation.md shows.")


def _of_each(function: Callable[[bytes], T], dataset: MaskedImages) -> list[T]:
    """The function's results for all masks that it can read, computed by several threads."""

    def read(index: int) -> list[T]:
        with contextlib.suppress(InputError):
            return [function(dataset.mask(index))]
        return []

    with ThreadPoolExecutor(THREADS) as pool:
        return [result for results in pool.map(read, range(len(dataset))) for result in results]


def _labels_folder(folder: epath.Path) -> epath.Path:
    return folder.parent / (folder.name + LABELS)


def _mask_dataset(folder: epath.Path, pairs: Sequence[tuple[str, str]], table: Table) -> MaskDataset:
    """The pairs (image, mask) as a data set whose classes have no names yet."""
    files, mask_files = zip(*pairs, strict=True)
    return MaskDataset(folder, files, mask_files, (), table)


def _pairs(folder: epath.Path) -> list[tuple[str, str]]:
    """(image, mask) for each image in a split's folder, sorted.

    Raises:
      InputError: an image has no mask, a mask no image, or two images have one name.
    """
    skipped: collections.Counter[str] = collections.Counter()
    files = list(image_files(folder, "", skipped))
    labels = [file for file in image_files(_labels_folder(folder), "", skipped) if file.lower().endswith(".png")]
    images, found = ({_stem(file): file for file in each} for each in (files, labels))
    for where, all_files, by_stem in ((folder, files, images), (_labels_folder(folder), labels, found)):
        if twins := set(all_files) - set(by_stem.values()):
            raise InputError(f"'{where}' has two files of the name {min(map(_stem, twins))!r}, and may have one.")
    for lonely, kind, where in (
        (images.keys() - found.keys(), "label PNG", _labels_folder(folder)),
        (found.keys() - images.keys(), "image", folder),
    ):
        if lonely:
            more = f" ({len(lonely):,} are missing)" if len(lonely) > 1 else ""
            has = sorted(image_files(where, "", skipped))
            hint = f"; it has {has[0]!r}: a mask has its image's name and ends in .png" if has else ""
            raise InputError(f"'{where}' has no {kind} of the name {min(lonely)!r}{more}{hint}.")
    return [(images[stem], found[stem]) for stem in sorted(images)]


def _stem(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(""))
