"""COCO's files: ROOT/annotations/instances_SPLIT.json, and images in ROOT/SPLIT (cocodataset.org, "data format")."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from castling_jax.data.annotations import BoxDataset, box_dataset
from castling_jax.data.folder import choose, parse_split
from castling_jax.errors import InputError, check, check_known, refusing
from castling_jax.storage import as_path

# The errors that a damaged file causes: any of its values may be missing or have the wrong type.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


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
        that `classes` lacks, or has an annotation whose category or image it does not list.
    """
    root = as_path(path, "the folder of a data set")
    name, percent, is_held_out = parse_split(split)
    check_known(f"split of '{root}'", name, coco_splits(path))
    file = root / "annotations" / f"instances_{name}.json"
    with refusing(DAMAGE, f"'{file}' is damaged"):
        content = json.loads(file.read_bytes(), object_hook=_without_mask)
        annotations = content["annotations"]
        images, categories = (_by_id(content[kind], f"{kind} in '{file}'") for kind in ("images", "categories"))
        for kind, known in (("image_id", images), ("category_id", categories)):
            for annotation in annotations:
                if annotation[kind] not in known:
                    raise InputError(
                        f"the annotation {annotation.get('id')} in '{file}' has the {kind} {annotation[kind]!r}, which "
                        "the file does not list."
                    )
        names = {category_id: str(category["name"]) for category_id, category in sorted(categories.items())}
        check(len({*names.values()}) == len(names), f"two categories in '{file}' have the same name.")
        known_names = list(names.values() if classes is None else classes)
        for category_name in names.values():
            if category_name not in known_names:
                raise InputError(f"'{file}' has the category {category_name!r}, which the model does not have.")
        class_of = {category_id: known_names.index(category_name) for category_id, category_name in names.items()}
        category_id_of = {class_number: category_id for category_id, class_number in class_of.items()}

        # `choose` draws a share from each class of images. Images with boxes have no class, so all count as class 0.
        listed = list(images.values())
        chosen = [listed[index] for index in choose(np.zeros(len(listed), np.int32), percent, is_held_out)]
        index_of = {image["id"]: index for index, image in enumerate(chosen)}
        rows = [_row(annotation, file) for annotation in annotations]
        if not chosen:
            raise InputError(f"the split {split!r} of '{root}' holds no images.")
        return box_dataset(
            root / name,
            [(str(image["file_name"]), image["id"], (image["height"], image["width"])) for image in chosen],
            [index_of.get(annotation["image_id"], -1) for annotation in annotations],
            {
                "boxes": np.array([box for box, _, _ in rows]),
                "classes": [class_of[annotation["category_id"]] for annotation in annotations],
                "crowd": np.array([is_crowd for _, is_crowd, _ in rows], bool),
                "areas": np.array([area for _, _, area in rows], np.float64),
            },
            known_names,
            (category_id_of.get(class_number, -1) for class_number in range(len(known_names))),
        )


def _row(annotation: dict[str, Any], file: epath.Path) -> tuple[list[float], bool, float]:
    """An annotation's corners, whether it is a crowd, and its area: NaN if the file states none."""
    with refusing(DAMAGE, f"the annotation {annotation.get('id')} in '{file}' is damaged"):
        x, y, width, height = map(float, annotation["bbox"])
        # Some tools write null for 0 and for an unknown area. Unlike bool, int refuses a text such as "no".
        is_crowd, area = bool(int(annotation.get("iscrowd") or 0)), annotation.get("area")
        return [x, y, x + width, y + height], is_crowd, math.nan if area is None else float(area)


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """Drops a mask as soon as it is parsed, because masks take most of the memory of COCO's file."""
    entry.pop("segmentation", None)
    return entry


def _by_id(entries: list[dict[str, Any]], kind: str) -> dict[Any, dict[str, Any]]:
    """id -> entry, in the order of the entries."""
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise InputError(f"two {kind} have the same id.")
    return found
