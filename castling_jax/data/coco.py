"""COCO's files: ROOT/annotations/instances_SPLIT.json, and images in ROOT/SPLIT (cocodataset.org, "data format")."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from castling_jax.data.annotations import LARGEST_AREA, LARGEST_INT, PIXELS, BoxDataset, box_dataset
from castling_jax.data.folder import choose, parse_split
from castling_jax.errors import InputError, check_known, refusing
from castling_jax.storage import as_path

BOX = "four finite numbers [x, y, width, height]"
MOST_SHOWN = 60  # characters of a wrong value
_Entry = dict[str, Any]


def coco_splits(path: epath.PathLike) -> list[str]:
    """The splits that have a file of annotations, such as "train2017".

    Raises:
      InputError: PATH has no folder `annotations`.
    """
    folder = as_path(path, "the folder of a data set") / "annotations"
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}', where COCO's annotation files should be.")
    found = (re.fullmatch(r"instances_(.+)\.json", entry.name) for entry in folder.iterdir())
    return sorted(match[1] for match in found if match)


def coco(path: epath.PathLike, split: str, classes: Sequence[str] | None = None) -> BoxDataset:
    """The images in PATH/SPLIT that PATH/annotations/instances_SPLIT.json lists, in its order.

    The classes are the file's categories, in the order of their ids. Images without a box are examples too. Masks are
    not read.

    Args:
      path: the data set's root folder.
      split: one of `coco_splits`; or a part of one, such as "10% of train" or "train without 10%", as in `folder`.
      classes: names of a model's classes, in the order of its outputs; the file need not have all of them. None takes
        the file's own.

    Raises:
      InputError: the file is missing or damaged, lists no images, uses an id or a category's name twice, has a category
        that `classes` lacks, or has an annotation whose category or image it does not list; a value is missing or is
        not allowed; or no image is where the file says.
    """
    root = as_path(path, "the folder of a data set")
    name, *_ = parse_split(split)
    check_known(f"split of '{root}'", name, coco_splits(path))
    file = root / "annotations" / f"instances_{name}.json"
    with refusing((OSError, ValueError, RecursionError), f"'{file}' is damaged"):
        content = json.loads(file.read_bytes(), object_hook=_without_mask)
    if not isinstance(content, dict):
        raise InputError(f"'{file}' is damaged: it must hold an object, not {_shown(content)}.")
    annotations = _entries(content, "annotations", file)
    images, categories = (_by_id(content, kind, file) for kind in ("images", "categories"))
    names = {category_id: _name(category, file) for category_id, category in sorted(categories.items())}
    _check_distinct(names, file)
    known_names = list(names.values() if classes is None else classes)
    for category_name in names.values():
        if category_name not in known_names:
            raise InputError(f"'{file}' has the category {category_name!r}, which the model does not have.")
    class_of = {category_id: known_names.index(category_name) for category_id, category_name in names.items()}
    category_id_of = {class_number: category_id for category_id, class_number in class_of.items()}

    listed = [_image(image, file) for image in images.values()]
    # `choose` draws a share from each class of images. Images with boxes have no class, so all count as class 0.
    chosen = [listed[index] for index in choose(np.zeros(len(listed), np.int32), split, root)]
    index_of = {image_id: index for index, (_, image_id, _) in enumerate(chosen)}
    rows = [_row(annotation, place, file) for place, annotation in enumerate(annotations)]
    for kind, known in (("image_id", images), ("category_id", categories)):
        for place, annotation in enumerate(annotations):
            value = annotation.get(kind)
            if type(value) not in (int, float, str) or value not in known:
                raise _wrong("annotation", annotation, kind, "one that the file lists", file, place)
    return box_dataset(
        root / name,
        chosen,
        [index_of.get(annotation["image_id"], -1) for annotation in annotations],
        {
            "boxes": np.array([box for box, _, _ in rows]),
            "classes": [class_of[annotation["category_id"]] for annotation in annotations],
            "crowd": np.array([is_crowd for _, is_crowd, _ in rows], bool),
            "areas": np.array([area for _, _, area in rows], np.float64),
        },
        known_names,
        (category_id_of.get(class_number, -1) for class_number in range(len(known_names))),
        naming="a file_name is a path in this folder, ROOT/SPLIT",
    )


def _image(image: _Entry, file: epath.Path) -> tuple[str, int | str, tuple[int, int]]:
    """An image's file, id and (height, width)."""
    name, sides = image.get("file_name"), [_number(image.get(side)) for side in ("height", "width")]
    if not isinstance(name, str) or not name:
        raise _wrong("image", image, "file_name", "a string that is not empty", file)
    for side, pixels in zip(("height", "width"), sides, strict=True):
        if not (1 <= pixels <= LARGEST_INT and pixels.is_integer()):
            raise _wrong("image", image, side, PIXELS, file)
    return name, image["id"], (int(sides[0]), int(sides[1]))


def _name(category: _Entry, file: epath.Path) -> str:
    name = category.get("name")
    if type(name) not in (int, str) or not str(name).strip():
        raise _wrong("category", category, "name", "a string that is not empty", file)
    return str(name)


def _row(annotation: _Entry, place: int, file: epath.Path) -> tuple[list[float], bool, float]:
    """An annotation's corners, whether it is a crowd, and its area: NaN if the file states none.

    Some tools write numbers as texts, and null for 0 and for an unknown area.
    """
    box, crowd, area = (annotation.get(name) for name in ("bbox", "iscrowd", "area"))
    numbers = [_number(value, bad=math.inf) for value in box] if isinstance(box, list) else []
    # A NaN is let through: such a box has no area, and is left out with the others that have none.
    if len(numbers) != 4 or any(map(math.isinf, numbers)):
        raise _wrong("annotation", annotation, "bbox", BOX, file, place)
    if crowd not in (None, 0, 1, "0", "1"):  # False and True are equal to 0 and 1
        raise _wrong("annotation", annotation, "iscrowd", "0 or 1", file, place)
    size = math.nan if area is None else _number(area, bad=-1.0)
    if size < 0 or size > LARGEST_AREA:
        raise _wrong("annotation", annotation, "area", f"a number from 0 to {LARGEST_AREA:.1e}", file, place)
    x, y, width, height = numbers
    return [x, y, x + width, y + height], crowd not in (None, 0, "0"), size


def _number(value: Any, *, bad: float = math.nan) -> float:
    """The number that a JSON value is, or that it is the text of; `bad` for any other value."""
    if type(value) not in (int, float, str):  # not isinstance: True is an int
        return bad
    try:
        return float(value)
    except (ValueError, OverflowError):
        return bad


def _without_mask(entry: _Entry) -> _Entry:
    """Drops a mask as soon as it is parsed, because masks take most of the memory of COCO's file."""
    entry.pop("segmentation", None)
    return entry


def _entries(content: _Entry, kind: str, file: epath.Path) -> list[_Entry]:
    """The list `kind` of a file's content, whose entries are objects."""
    entries = content.get(kind)
    if not isinstance(entries, list):
        value = _shown(entries) if kind in content else "missing"
        raise InputError(f"'{file}' is damaged: its {kind} must be a list of objects, not {value}.")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(
                f"'{file}' is damaged: number {place + 1} of its {kind} must be an object, not {_shown(entry)}."
            )
    return entries


def _by_id(content: _Entry, kind: str, file: epath.Path) -> dict[Any, _Entry]:
    """id -> entry, in the order of the entries. An id is a whole number; an image's may be a string too."""
    one = {"images": "image", "categories": "category"}[kind]
    found: dict[Any, _Entry] = {}
    for place, entry in enumerate(_entries(content, kind, file)):
        value: Any = entry.get("id")
        if kind == "images" and type(value) not in (int, str):
            raise _wrong(one, entry, "id", "a whole number or a string", file, place)
        if kind == "categories" and not (type(value) is int and 0 <= value <= LARGEST_INT):
            raise _wrong(one, entry, "id", f"a whole number from 0 to {LARGEST_INT}", file, place)
        if value in found:
            raise InputError(f"two {kind} in '{file}' have the same id, {_shown(value)}.")
        found[value] = entry
    return found


def _check_distinct(names: dict[Any, str], file: epath.Path) -> None:
    first: dict[str, Any] = {}
    for category_id, name in names.items():
        if name in first:
            raise InputError(
                f"two categories in '{file}' have the same name, {name!r}: those with the ids {first[name]} and "
                f"{category_id}."
            )
        first[name] = category_id


def _wrong(one: str, entry: _Entry, field: str, allowed: str, file: epath.Path, place: int = 0) -> InputError:
    """The error about a field of an entry, which is named by its id or, if that is missing or wrong, by its place."""
    has_id = isinstance(entry.get("id"), int | str) and field != "id"
    which = f"the {one} {_shown(entry['id'])}" if has_id else f"the {one} number {place + 1}"
    value = f"has the {field} {_shown(entry[field])}, and" if field in entry else f"has no {field}:"
    return InputError(f"{which} in '{file}' {value} it must be {allowed}.")


def _shown(value: Any) -> str:
    """A value as JSON has it, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
