"""Images that are annotated with boxes: COCO's and PASCAL VOC's files become a `BoxDataset`."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from castling_jax.data.decode import Size
from castling_jax.errors import InputError, refusing
from castling_jax.storage import is_remote

REMOTE_READERS = 32  # threads that read small files from a bucket, where each read is a request
Boxes = Float[np.ndarray, "boxes 4"]
# What belongs to each box, beside the box itself: its class, whether it is a crowd, and its area.
COLUMNS = {"boxes": np.float32, "classes": np.int32, "crowd": bool, "areas": np.float32}


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The boxes of one image.

    Attributes:
      image_id: COCO's number, or the name of VOC's file without its suffix.
      size: (height, width) of the image in pixels.
      boxes: x0, y0, x1, y1 in pixels, clipped to the image.
      classes: from 0.
      crowd: whether what is detected in the box counts neither as right nor as wrong, and training passes the box over:
        COCO's crowds and VOC's difficult objects.
      areas: in square pixels: COCO's are the areas of the masks, others are width x height.
      category_ids: the classes' numbers in the file. VOC's file has names alone: there the first class has 1.
    """

    image_id: int | str
    size: Size
    boxes: Boxes
    classes: Int[np.ndarray, "boxes"]
    crowd: Bool[np.ndarray, "boxes"]
    areas: Float[np.ndarray, "boxes"]
    category_ids: Int[np.ndarray, "boxes"]

    def example(self, image: bytes) -> dict[str, Any]:
        """The example that a data set gives: the encoded image, "boxes", "classes", "crowd", and "size", int32 [2]."""
        columns = {name: getattr(self, name) for name in ("boxes", "classes", "crowd")}
        return {"image": image, **columns, "size": np.array(self.size, np.int32)}


@dataclasses.dataclass(frozen=True)
class BoxDataset:
    """Image files, and the boxes of all of them in one table: it is small, and worker processes get a copy.

    Attributes:
      folder: of the images.
      files: relative to the folder.
      image_ids: of the files.
      sizes: (height, width) of the images in pixels, as the annotations have them.
      starts: the boxes of image i are those from starts[i] to starts[i + 1].
      columns: the arrays of COLUMNS, with a row for each box.
      classes: the names.
      category_ids: the classes' numbers in the file; -1 for a class that the file does not have.
      dropped: how many boxes were left out, because none of their area is in the image.
    """

    annotation = "boxes"

    folder: epath.Path
    files: Sequence[str]
    image_ids: Sequence[int | str]
    sizes: Int[np.ndarray, "images 2"]
    starts: Int[np.ndarray, "images+1"]
    columns: dict[str, np.ndarray]
    classes: tuple[str, ...]
    category_ids: Int[np.ndarray, "classes"]
    dropped: int

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def box_counts(self) -> Int[np.ndarray, "images"]:
        """How many boxes each image has, crowds included."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with refusing(OSError, "the file cannot be read"):
            image = (self.folder / self.files[index]).read_bytes()
        return self.annotations(index).example(image)

    def annotations(self, index: int) -> Annotations:
        """The boxes of an image, which is not read."""
        rows = slice(self.starts[index], self.starts[index + 1])
        columns = {name: column[rows] for name, column in self.columns.items()}
        height, width = self.sizes[index].tolist()
        categories = self.category_ids[columns["classes"]]
        return Annotations(self.image_ids[index], (height, width), **columns, category_ids=categories)

    def describe(self, index: int) -> str:
        return f"'{self.folder / self.files[index]}'"

    def contents(self) -> dict[str, str]:
        table = b"".join(array.tobytes() for array in (self.starts, *self.columns.values()))
        return {
            "file names": hashlib.sha256("\n".join(self.files).encode()).hexdigest(),
            "annotations": hashlib.sha256(table).hexdigest(),
        }


def box_dataset(
    folder: epath.Path,
    images: Sequence[tuple[str, int | str, Size]],
    image_of: list[int],
    columns: dict[str, Any],
    classes: Sequence[str],
    category_ids: Iterable[int],
) -> BoxDataset:
    """The data set of images and of boxes in any order; boxes are clipped to their images.

    Args:
      folder: of the images.
      images: (file, id, (height, width)) of each.
      image_of: the number of each box's image; boxes of image -1 are passed over.
      columns: as COLUMNS names them, a row for each box; an area that is NaN becomes width x height.
      classes: the names.
      category_ids: of the classes.
    """
    files, image_ids, _ = zip(*images, strict=True)
    sizes = np.array([size for _, _, size in images], np.int32).reshape(-1, 2)
    order = np.argsort(image_of, kind="stable")[np.count_nonzero(np.array(image_of) < 0) :]
    place = np.array(image_of, np.int64)[order]
    columns = {name: np.array(column)[order] for name, column in columns.items()}
    columns["boxes"], has_area = clip_boxes(columns["boxes"].reshape(-1, 4), sizes[place])
    areas = np.prod(columns["boxes"][:, 2:] - columns["boxes"][:, :2], axis=-1)
    columns["areas"] = np.where(np.isnan(columns["areas"]), areas, columns["areas"])
    starts = np.searchsorted(place[has_area], np.arange(len(files) + 1))
    columns = {name: columns[name][has_area].astype(dtype) for name, dtype in COLUMNS.items()}
    numbers, dropped = np.array(list(category_ids), np.int32), int((~has_area).sum())
    return BoxDataset(folder, files, image_ids, sizes, starts, columns, tuple(classes), numbers, dropped)


def clip_boxes(boxes: Boxes, size: Any) -> tuple[Boxes, Bool[np.ndarray, "boxes"]]:
    """Boxes cut off at the border of their image, and which of them have an area then.

    Those that have none lie outside, or were given without one, with their corners swapped, or with a NaN.

    Args:
      boxes: x0, y0, x1, y1 in pixels.
      size: (height, width) of the image, or of each box's image, [boxes, 2].
    """
    width_height = np.broadcast_to(np.asarray(size)[..., ::-1], (len(boxes), 2))
    clipped = np.clip(boxes, 0, np.tile(width_height, 2)).astype(np.float32)
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(-1)


def check_size(size: Size, example: dict[str, Any]) -> None:
    """Refuses an image of another size than its boxes were drawn in.

    Args:
      size: (height, width) of the image as it is seen, upright if EXIF orientations count.
      example: of a data set; one without a "size" was not annotated.

    Raises:
      InputError: the sizes differ.
    """
    annotated = tuple(map(int, example.get("size", size)))
    if annotated != size:
        turned = ": config.dataset.exif may turn it" if annotated == size[::-1] else ""
        raise InputError(
            f"the image has {size[1]} x {size[0]} pixels, and its annotations are of {annotated[1]} x {annotated[0]}"
            f"{turned}."
        )


def read_all(read: Callable[[epath.Path], Any], paths: Sequence[epath.Path]) -> list[Any]:
    """What `read` makes of each path, in their order; from a bucket, many are read at a time."""
    if not any(map(is_remote, paths[:1])):
        return list(map(read, paths))
    with concurrent.futures.ThreadPoolExecutor(REMOTE_READERS) as pool:
        return list(pool.map(read, paths))
