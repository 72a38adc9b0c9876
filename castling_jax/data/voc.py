"""PASCAL VOC's files: ROOT/ImageSets/Main/SPLIT.txt, ROOT/Annotations/NAME.xml and ROOT/JPEGImages/NAME.jpg."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from etils import epath

from castling_jax.data.annotations import LARGEST_INT, PIXELS, BoxDataset, box_dataset, read_all
from castling_jax.data.decode import Size
from castling_jax.data.folder import IMAGE_SUFFIXES, choose, parse_split, read_list
from castling_jax.errors import InputError, check_known, refusing
from castling_jax.storage import as_path

# The errors that a damaged file causes; LookupError comes from an unknown encoding.
DAMAGE = (OSError, ElementTree.ParseError, ValueError, LookupError)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _File(NamedTuple):
    """The content of an image's XML file."""

    size: Size
    names: list[str]
    boxes: list[list[float]]
    difficult: list[bool]


def voc_splits(path: epath.PathLike) -> list[str]:
    """The splits that have a list of images.

    Raises:
      InputError: PATH has no folder `ImageSets/Main`.
    """
    folder = as_path(path, "the folder of a data set") / "ImageSets" / "Main"
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}', where the lists of VOC's splits should be.")
    return sorted(entry.stem for entry in folder.iterdir() if entry.suffix == ".txt")


def voc(path: epath.PathLike, split: str, classes: Sequence[str] | None = None) -> BoxDataset:
    """The images that PATH/ImageSets/Main/SPLIT.txt lists, in its order.

    The classes are the names of all objects in PATH/Annotations, sorted, so a class has the same number in every
    split. Corners keep the values that the files state, as in TFDS and PaddleDetection: VOC counts pixels from 1, and
    this 1 is not subtracted. Difficult objects become crowds, as `Annotations` explains.

    Args:
      path: the data set's root folder.
      split: one of `voc_splits`; or a part of one, such as "10% of train" or "train without 10%", as in `folder`.
      classes: names of a model's classes, in the order of its outputs; only the split's own files are read then. None
        reads all files to find the names.

    Raises:
      InputError: a file is missing or damaged, the list is empty, has an image twice or a line that is no image's name,
        an object has a class that `classes` lacks, or no image is in PATH/JPEGImages.
    """
    root = as_path(path, "the folder of a data set")
    name, *_ = parse_split(split)
    check_known(f"split of '{root}'", name, voc_splits(path))
    list_path = root / "ImageSets" / "Main" / f"{name}.txt"
    listed = read_list(list_path)
    # `choose` draws a share from each class of images. Images with boxes have no class, so all count as class 0.
    stems = [listed[index] for index in choose(np.zeros(len(listed), np.int32), split, root)]

    with refusing(OSError, f"'{root}' needs the folders Annotations and JPEGImages"):
        annotated = {entry.stem for entry in (root / "Annotations").iterdir() if entry.suffix == ".xml"}
        image_names = [entry.name for entry in (root / "JPEGImages").iterdir()]
    if unknown := [stem for stem in stems if stem not in annotated]:
        raise InputError(
            f"'{list_path}' has the line {unknown[0]!r}, but '{root / 'Annotations'}' has no file of this name with "
            ".xml after it: a line must be the bare name of one image, without a folder, a suffix or a label."
        )
    to_read = sorted({*stems, *(annotated if classes is None else ())})
    files = dict(zip(to_read, read_all(_read, [root / "Annotations" / f"{stem}.xml" for stem in to_read]), strict=True))
    found = sorted({object_name for file in files.values() for object_name in file.names})
    known = found if classes is None else list(classes)
    for stem in stems:
        for object_name in set(files[stem].names) - set(known):
            raise InputError(f"'{stem}.xml' in '{root}' has the class {object_name!r}, which the model does not have.")

    file_of = {epath.Path(file).stem: file for file in image_names if file.lower().endswith(IMAGE_SUFFIXES)}
    read = [files[stem] for stem in stems]
    boxes = np.array([box for file in read for box in file.boxes], np.float64).reshape(-1, 4)
    return box_dataset(
        root / "JPEGImages",
        [(file_of.get(stem, f"{stem}.jpg"), stem, file.size) for stem, file in zip(stems, read, strict=True)],
        [index for index, file in enumerate(read) for _ in file.boxes],
        {
            "boxes": boxes,
            "classes": [known.index(object_name) for file in read for object_name in file.names],
            "crowd": [difficult for file in read for difficult in file.difficult],
            "areas": np.full(len(boxes), np.nan),
        },
        known,
        range(1, len(known) + 1),
        naming="an image has the name of its line in the list, with an image's suffix after it",
    )


def _read(path: epath.Path) -> _File:
    with refusing(DAMAGE, f"'{path}' is missing or damaged"):
        root = ElementTree.fromstring(path.read_bytes())
        objects = root.findall("object")
        height, width = (_number(root, f"size/{side}") for side in ("height", "width"))
        for side, pixels in (("height", height), ("width", width)):
            if not (1 <= pixels <= LARGEST_INT and pixels.is_integer()):
                raise ValueError(f"its {side} is {pixels:g}, not {PIXELS}")
        return _File(
            (int(height), int(width)),
            [_text(one, "name") for one in objects],
            [[_number(one, f"bndbox/{corner}") for corner in CORNERS] for one in objects],
            [_is_difficult(one) for one in objects],
        )


def _is_difficult(element: ElementTree.Element) -> bool:
    text = element.findtext("difficult", "0").strip()
    if text not in ("0", "1"):
        raise ValueError(f"an object's difficult is {text!r}, not 0 or 1")
    return text == "1"


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"it has no {path}")
    return text


def _number(element: ElementTree.Element, path: str) -> float:
    text = _text(element, path)
    with contextlib.suppress(ValueError):
        if not math.isinf(number := float(text)):  # a NaN is let through: such a box has no area, and is left out
            return number
    raise ValueError(f"its {path} is {text!r}, not a finite number")
