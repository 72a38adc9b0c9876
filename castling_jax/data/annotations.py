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
from castling_jax.data.folder import hash_names
from castling_jax.errors import InputError, check, refusing
from castling_jax.storage import is_remote

LARGEST_INT = 2**31 - 1  # sizes and ids are kept as int32
PIXELS = f"a whole number of pixels from 1 to {LARGEST_INT}"
LARGEST_AREA = float(np.finfo(np.float32).max)
LOOKED_FOR = 100  # images of which at least one must exist
REMOTE_READERS = 32  # threads that read small files from a bucket, where each read is a request
Boxes = Float[np.ndarray, "boxes 4"]
# The table of boxes has these columns: a box's corners, its class, whether it is a crowd, and its area.
COLUMNS = {"boxes": np.float32, "classes": np.int32, "crowd": bool, "areas": np.float32}


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The boxes of one image.

    Attributes:
      image_id: COCO's number, or the name of VOC's file without its suffix.
      size: (height, width) of the image in pixels.
      boxes: x0, y0, x1, y1 in pixels, clipped to the image.
      classes: the class of each box, counted from 0.
      crowd: True for COCO's crowds and VOC's difficult objects. Training skips such a box, and in an evaluation a
        detection in it counts neither as right nor as wrong.
      areas: in square pixels: the area of the mask if COCO's file states it, else width x height.
      category_ids: the class of each box, by its number in the annotation file. VOC's files have names only, so VOC's
        classes are numbered from 1.
    """

    image_id: int | str
    size: Size
    boxes: Boxes
    classes: Int[np.ndarray, "boxes"]
    crowd: Bool[np.ndarray, "boxes"]
    areas: Float[np.ndarray, "boxes"]
    category_ids: Int[np.ndarray, "boxes"]

    def example(self, image: bytes) -> dict[str, Any]:
        """One example of a data set: "image" (encoded), "boxes", "classes", "crowd" and "size" (int32 [2])."""
        columns = {name: getattr(self, name) for name in ("boxes", "classes", "crowd")}
        return {"image": image, **columns, "size": np.array(self.size, np.int32)}


@dataclasses.dataclass(frozen=True)
class BoxDataset:
    """Image files, and one table with the boxes of all images. Each worker process gets a copy of the small table.

    Attributes:
      folder: the folder that holds the images.
      files: the images' paths, relative to the folder.
      image_ids: the id of each image, as in `Annotations`.
      sizes: (height, width) of each image in pixels, as the annotations state it.
      starts: the boxes of image i are the rows of `columns` from starts[i] up to, not including, starts[i + 1].
      columns: the table: an array for each name in COLUMNS, with a row for each box.
      classes: the classes' names.
      category_ids: the number of each class in the annotation file; -1 for a class that the file does not have.
      dropped: number of boxes that were left out, because they have no area inside their image.
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
        # A name in an annotation file may be none that a disk can have, which Python refuses with a ValueError.
        with refusing((OSError, ValueError), "the file cannot be read"):
            image = (self.folder / self.files[index]).read_bytes()
        return self.annotations(index).example(image)

    def annotations(self, index: int) -> Annotations:
        """The boxes of an image, without reading the image."""
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
            "file names": hash_names(self.files),
            "annotations": hashlib.sha256(table).hexdigest(),
        }


def box_dataset(
    folder: epath.Path,
    images: Sequence[tuple[str, int | str, Size]],
    image_of: list[int],
    columns: dict[str, Any],
    classes: Sequence[str],
    category_ids: Iterable[int],
    *,
    naming: str,
) -> BoxDataset:
    """Builds a data set from images and their boxes, which may come in any order. Boxes are clipped to their images.

    Args:
      folder: the folder that holds the images.
      images: (file, id, (height, width)) of each image.
      image_of: for each box, the index of its image in `images`; -1 leaves the box out.
      columns: a sequence for each name in COLUMNS, with a row for each box. An area of NaN becomes width x height.
      classes: the classes' names.
      category_ids: the number of each class in the annotation file.
      naming: what the name of an image's file must be, for the message where no image is there.

    Raises:
      InputError: there are no classes, or the first images are all missing.
    """
    check(classes, f"the annotations of '{folder}' name no class, and a detector needs one.")
    files, image_ids, _ = zip(*images, strict=True)
    # A missing image is skipped and counted. If all are missing, the names or the folder are wrong.
    looked_for = files[:LOOKED_FOR]
    if not any((folder / file).exists() for file in looked_for):
        raise InputError(
            f"none of the first {len(looked_for):,} images of the annotations is in '{folder}', such as "
            f"{files[0]!r}: {naming}."
        )
    sizes = np.array([size for _, _, size in images], np.int32).reshape(-1, 2)
    # Sorted by image, the boxes of image -1 come first, and are cut off.
    order = np.argsort(image_of, kind="stable")[np.count_nonzero(np.array(image_of) < 0) :]
    image_index = np.array(image_of, np.int64)[order]
    columns = {name: np.array(column)[order] for name, column in columns.items()}
    columns["boxes"], has_area = clip_boxes(columns["boxes"].reshape(-1, 4), sizes[image_index])
    areas = np.prod(columns["boxes"][:, 2:] - columns["boxes"][:, :2], axis=-1)
    columns["areas"] = np.where(np.isnan(columns["areas"]), areas, columns["areas"])
    starts = np.searchsorted(image_index[has_area], np.arange(len(files) + 1))
    columns = {name: columns[name][has_area].astype(dtype) for name, dtype in COLUMNS.items()}
    numbers, dropped = np.array(list(category_ids), np.int32), int((~has_area).sum())
    return BoxDataset(folder, files, image_ids, sizes, starts, columns, tuple(classes), numbers, dropped)


def clip_boxes(boxes: Boxes, size: Any) -> tuple[Boxes, Bool[np.ndarray, "boxes"]]:
    """Clips boxes to their image, and tells for each clipped box whether it has an area.

    A clipped box has no area if the box lies outside the image, has no area itself, has swapped corners or has a NaN.

    Args:
      boxes: x0, y0, x1, y1 in pixels.
      size: (height, width) of the image, or of each box's image, [boxes, 2].
    """
    width_height = np.broadcast_to(np.asarray(size)[..., ::-1], (len(boxes), 2))
    clipped = np.clip(boxes, 0, np.tile(width_height, 2)).astype(np.float32)
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(-1)


def check_size(size: Size, example: dict[str, Any]) -> None:
    """Refuses an image whose size is not the one in its annotations.

    Args:
      size: (height, width) of the decoded image, after its EXIF orientation if config.dataset.exif is set.
      example: an example of a data set. An example without a "size" has no annotations, and passes.

    Raises:
      InputError: the sizes differ.
    """
    annotated = tuple(map(int, example.get("size", size)))
    if annotated != size:
        turned = ": config.dataset.exif may turn it" if annotated == size[::-1] else ""
        raise InputError(
            f"the image has {size[1]} x {size[0]} pixels, but its annotations say {annotated[1]} x {annotated[0]}"
            f"{turned}."
        )


def read_all(read: Callable[[epath.Path], Any], paths: Sequence[epath.Path]) -> list[Any]:
    """Calls `read` on each path and returns the results in order. From a bucket, many threads read at once."""
    if not paths or not is_remote(paths[0]):
        return list(map(read, paths))
    with concurrent.futures.ThreadPoolExecutor(REMOTE_READERS) as pool:
        return list(pool.map(read, paths))
