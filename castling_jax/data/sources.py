"""Where examples come from: names -> random-access datasets.

digits                 scikit-learn's handwritten digits, part of its wheel
folder:PATH            images in PATH/SPLIT/CLASS/, or in PATH/CLASS/
images:PATH            images without labels in and below PATH/SPLIT/ or PATH/
npz:FILE               arrays SPLIT_images and SPLIT_labels in one NumPy archive, as MedMNIST has them
coco:ROOT              boxes: ROOT/annotations/instances_SPLIT.json, and images in ROOT/SPLIT
voc:ROOT               boxes: ROOT/Annotations/*.xml, ROOT/JPEGImages, and lists in ROOT/ImageSets/Main/SPLIT.txt
masks:ROOT             masks: images in ROOT/SPLIT, PNGs of labels of the same names in ROOT/SPLIT_labels
NAME[/CONFIG][:VERSION]  a data set of tensorflow-datasets, prepared by castling_jax prepare
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int

from castling_jax.data.annotations import Annotations, clip_boxes
from castling_jax.data.arrays import ArrayDataset, npz, npz_splits, numbers
from castling_jax.data.coco import coco, coco_splits
from castling_jax.data.decode import image_size
from castling_jax.data.digits import SPLITS as DIGITS_SPLITS
from castling_jax.data.digits import read_digits
from castling_jax.data.folder import folder, folder_splits, images, images_splits
from castling_jax.data.masks import (
    IGNORED,
    MOST_CLASSES,
    Table,
    check_not_coloured,
    masks,
    masks_splits,
    numbers_in,
    table_of,
)
from castling_jax.data.voc import voc, voc_splits
from castling_jax.errors import InputError, check_known, in_one_sentence, refusing
from castling_jax.storage import as_path

FOLDER = "folder:"  # starts the name of a data set that is a folder of images
HELD_OUT_SPLITS = ("val", "valid", "validation", "test")  # in the order of preference
HELD_OUT_PERCENT = 10  # percentage of train that is held out if a data set has no HELD_OUT_SPLITS
UNREADABLE = (ValueError, RuntimeError)  # raised by ArrayRecord and protocol buffers
# Smaller data sets are kept in memory, encoded, because reading a small record takes longer than decoding it.
IN_MEMORY_BYTES = 256_000_000
# Data set of tensorflow-datasets -> (the feature that holds its masks, names or number of its classes, the number of
# the first class in the masks). Smaller numbers are pixels without a class. Other data sets' classes start at
# config.dataset.first_label.
TFDS_MASKS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "oxford_iiit_pet": ("segmentation_mask", ("pet", "background", "border"), 1),
}
# Data sets of tensorflow-datasets that no task can use -> why, and what to take instead.
UNUSABLE = {
    "scene_parse150": (
        "its masks have colours, for the instances of 100 kinds of objects: read ADE20K's 150 classes from the "
        "published files as masks:ROOT, as docs/howto/segmentation.md shows"
    )
}
TFDS_NAME = r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?"


class Dataset(Protocol):
    """Annotated images, read at random access by many threads at once."""

    @property
    def annotation(self) -> str:
        """What each image comes with: "label", "boxes", "mask" or "none".

        With "boxes" there is also a method `annotations(index)`, with "mask" there are those of `MaskedImages`.
        """

    @property
    def num_classes(self) -> int: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": encoded bytes or uint8 [height, width, 3]; "label": the class's number, from 0}.

        If the pixels of the data set do not have 8 bits, all its images are float32 [height, width, 3] in [0, 1].
        Instead of "label", a data set with boxes has "boxes", "classes", "crowd" and "size", as in `Annotations`; one
        with masks has "mask" (encoded) and "table", as in `MaskDataset`; one without annotations has the image alone.

        Raises:
          InputError: the image cannot be read.
        """

    def describe(self, index: int) -> str:
        """A name for an example in messages."""

    def contents(self) -> dict[str, str]:
        """Marks that change when the images change: kind of mark -> mark, such as {"version": "mnist/3.0.1"}."""


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
    """A split of a tensorflow-datasets data set in ArrayRecord files.

    Attributes:
      name: the data set's name, with configuration and version if the user named them.
      split: the split in TFDS's notation.
      source: TFDS's examples with encoded images, by index; a list if they are in memory.
      image: name of the feature that is the image.
      label: name of the feature that is the label.
      classes: names of the labels.
      version: the data set's full name, such as "mnist/3.0.1".
    """

    annotation = "label"

    name: str
    split: str
    source: Any
    image: str
    label: str
    classes: tuple[str, ...]
    version: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        return {"image": example[self.image], "label": int(example[self.label])}

    def describe(self, index: int) -> str:
        try:
            example = self._example(index)
            file_name = example.get("file_name", example.get("image/filename", b""))
        except InputError:  # the record is damaged, and the caller needs a name for it to say so
            file_name = b""
        return f"{self.name} {self.split} {index}" + (f" '{file_name.decode()}'" if file_name else "")

    def contents(self) -> dict[str, str]:
        return {"version": self.version}

    def _example(self, index: int) -> dict[str, Any]:
        with refusing(UNREADABLE, "the record cannot be read"):
            return self.source[int(index)]


@dataclasses.dataclass(frozen=True)
class TfdsBoxes(TfdsDataset):
    """Images with boxes, such as TFDS's COCO and PASCAL VOC; `label` names the feature that holds an image's objects.

    `annotations` reads the whole record of an image. Boxes that have no area inside the image are left out, and nothing
    counts them.
    """

    annotation = "boxes"

    @property
    def category_ids(self) -> Int[np.ndarray, "classes"]:
        """The number of each class in the annotations, which is TFDS's label."""
        return np.arange(self.num_classes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        return self._annotations(index, example).example(example[self.image])

    def annotations(self, index: int) -> Annotations:
        """The boxes of an image. Only the image's header is decoded, for the size; `category_ids` are TFDS's labels.

        Raises:
          InputError: the record or the image's header cannot be read.
        """
        return self._annotations(index, self._example(index))

    def _annotations(self, index: int, example: dict[str, Any]) -> Annotations:
        objects, size = example[self.label], image_size(example[self.image])
        # TFDS divides the coordinates by the image's height and width.
        top_left_bottom_right = np.asarray(objects["bbox"], np.float64).reshape(-1, 4) * np.tile(size, 2)
        boxes, has_area = clip_boxes(top_left_bottom_right[:, [1, 0, 3, 2]], size)
        classes = np.asarray(objects["label"], np.int32)
        crowd = np.asarray(objects.get("is_crowd", objects.get("is_difficult", np.zeros(len(boxes)))), bool)
        areas = np.asarray(objects.get("area", np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)), np.float32)
        columns = [column[has_area] for column in (boxes, classes, crowd, areas, classes)]  # the last: category_ids
        return Annotations(int(example.get("image/id", index)), size, *columns)


@dataclasses.dataclass(frozen=True)
class TfdsMasks(TfdsDataset):
    """Images with masks; `label` names the feature that is the mask.

    Attributes:
      table: the class of each number in the masks, as in `MaskDataset`.
    """

    annotation = "mask"

    table: Table

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        return {"image": example[self.image], "mask": example[self.label], "table": self.table}

    def mask(self, index: int) -> bytes:
        return self._example(index)[self.label]


@dataclasses.dataclass(frozen=True)
class Unread:
    """Stands in for a data set that is not on this machine. Its sizes are enough to compile a training step."""

    length: int
    num_classes: int
    annotation: str = "label"

    @property
    def classes(self) -> tuple[str, ...]:
        return numbers(self.num_classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise InputError(f"image {index} cannot be read, because the data set is not on this machine.")

    def describe(self, index: int) -> str:
        return f"image {index}"

    def contents(self) -> dict[str, str]:
        return {}


# What a data set's name starts with -> (the function that loads a split, the function that lists the splits).
FILES: dict[str, tuple[Callable[..., Dataset], Callable[[epath.PathLike], list[str]]]] = {
    "folder": (folder, folder_splits),
    "images": (images, images_splits),
    "npz": (npz, npz_splits),
    "coco": (coco, coco_splits),
    "voc": (voc, voc_splits),
    "masks": (masks, masks_splits),
}


def load_dataset(
    name: str,
    split: str,
    *,
    data_dir: epath.PathLike | None = None,
    classes: Sequence[str] | None = None,
    annotation: str | None = None,
    ignore_label: int = IGNORED,
    first_label: int = 0,
) -> Dataset:
    """Loads a split of a dataset by its name; the module's docstring lists the names.

    Args:
      name: name of the dataset.
      split: one of its splits; for tensorflow-datasets in its notation, such as "train[:90%]".
      data_dir: folder of tensorflow-datasets; None is its default, ~/tensorflow_datasets.
      classes: names of a model's classes, as in `folder`, `coco`, `voc` and `masks`, and for masks whose classes
        tensorflow-datasets does not name; other data sets ignore them.
      annotation: "label" or "mask", for a data set of tensorflow-datasets that has both; None takes labels.
      ignore_label: the number of a mask's pixels without a class.
      first_label: the number of the first class in masks; smaller numbers are pixels without a class.

    Raises:
      InputError: the dataset or the split is unknown, is not prepared, is empty, or has no annotations.
    """
    if name == "digits":
        return digits(split)
    labels = {"ignore_label": ignore_label, "first_label": first_label}
    if (path := path_of(name)) is not None:
        read, _ = FILES[kind_of(name)]
        return read(path, split, classes, **(labels if read is masks else {}))
    data_dir = None if data_dir is None else as_path(data_dir, "data_dir")
    return tfds_dataset(name, split, classes, data_dir=data_dir, annotation=annotation, **labels)


def kind_of(name: str) -> str:
    """The part of a data set's name before the first colon: "folder" for folder:PATH."""
    return name.partition(":")[0]


def path_of(name: str) -> str | None:
    """The PATH of folder:PATH and of the other names in FILES; None for data sets that are no files of the user's."""
    kind, colon, path = name.partition(":")
    return path if colon and kind in FILES else None


def find_splits(name: str, *, data_dir: epath.PathLike | None = None) -> tuple[str, str]:
    """Chooses the splits of a data set to learn from and to evaluate on, for users who name none.

    Returns:
      "train" and the first of HELD_OUT_SPLITS that the data set has. If it has none, HELD_OUT_PERCENT of train is held
      out, always the same images: "train without 10%" and "10% of train" for a folder, "train[:90%]" and "train[90%:]"
      for tensorflow-datasets. COCO's "train2017" and "val2017" count as "train" and "val".

    Raises:
      InputError: the dataset is unknown, or the folder is missing.
    """
    if name == "digits":
        splits: Collection[str] = DIGITS_SPLITS
    elif (path := path_of(name)) is not None:
        _, splits_in = FILES[kind_of(name)]
        splits = splits_in(path)
    else:
        splits = tfds_builder(name, data_dir=data_dir).info.splits
    named = {split: split for split in splits}
    if kind_of(name) == "coco":
        # The latest year comes last and wins; a split without a year wins over all years.
        named = {re.sub(r"\d+$", "", split): split for split in sorted(splits)} | named
    train = named.get("train", "train")
    for held_out in HELD_OUT_SPLITS:
        if held_out in named:
            return train, named[held_out]
    if path_of(name) is not None:
        return f"{train} without {HELD_OUT_PERCENT}%", f"{HELD_OUT_PERCENT}% of {train}"
    return f"train[:{100 - HELD_OUT_PERCENT}%]", f"train[{100 - HELD_OUT_PERCENT}%:]"


def digits(split: str) -> ArrayDataset:
    """scikit-learn's handwritten digits: 1,797 real grey images of 8 x 8 pixels.

    Args:
      split: "test", a stratified fifth (always the same), or "train", the rest. To choose hyper-parameters without the
        test split, "minival" is a stratified fifth of "train", and "minitrain" the rest of "train".

    Raises:
      InputError: the split is unknown.
    """
    check_known("split of digits", split, DIGITS_SPLITS)
    pixels, labels = read_digits(split)
    images = (pixels / 16).astype(np.float32)  # scikit-learn's values are from 0 to 16
    return ArrayDataset(np.repeat(images[..., None], 3, axis=-1), labels, num_classes=10)


def tfds_dataset(
    name: str,
    split: str,
    classes: Sequence[str] | None = None,
    *,
    data_dir: epath.PathLike | None = None,
    annotation: str | None = None,
    ignore_label: int = IGNORED,
    first_label: int = 0,
) -> TfdsDataset:
    """Loads a split of a tensorflow-datasets data set, with labels, boxes or masks; TensorFlow is not needed.

    Args:
      name: NAME[/CONFIG][:VERSION]; a data set that is in data_dir need not be known to tensorflow-datasets.
      split: the split in TFDS's notation.
      classes: as in `load_dataset`.
      data_dir: folder of the data sets; None is TFDS's default.
      annotation: as in `load_dataset`.
      ignore_label: as in `load_dataset`.
      first_label: as in `load_dataset`.

    Raises:
      InputError: the name or the split is unknown, or the data set is not prepared or has no annotations.
    """
    import tensorflow_datasets as tfds  # takes a second

    builder = tfds_builder(name, data_dir=data_dir)
    image, label = annotated_image(builder, annotation)
    feature = builder.info.features[label]
    is_mask = isinstance(feature, tfds.features.Image)
    try:
        # Images stay encoded: the loader decodes only the part that a crop needs, and TFDS's decoder needs TensorFlow.
        encoded = dict.fromkeys((image, label) if is_mask else (image,), tfds.decode.SkipDecoding())
        source = builder.as_data_source(split, decoders=encoded)
    except Exception as error:  # TFDS raises many kinds
        raise _unreadable(builder, name, split, data_dir, error) from error
    if 0 < builder.info.dataset_size <= IN_MEMORY_BYTES:
        with contextlib.suppress(*UNREADABLE):  # with a damaged record, all records are read one by one instead
            source = source.__getitems__(range(len(source)))
    if is_mask:
        masked = TfdsMasks(name, split, source, image, label, (), builder.info.full_name, np.zeros(256, np.uint8))
        return _with_classes(masked, builder.name, classes, ignore_label, first_label)
    is_boxes = isinstance(feature, tfds.features.Sequence)
    names = tuple((feature["label"] if is_boxes else feature).names)  # TFDS gives numbers to classes without names
    kind = TfdsBoxes if is_boxes else TfdsDataset
    dataset = kind(name, split, source, image, label, names, builder.info.full_name)
    if not len(dataset):
        raise InputError(f"the split {split!r} of {name} holds no images.")
    if is_boxes:
        return dataset
    # TFDS marks missing labels, as in many test splits, by -1.
    first_label = 0
    with contextlib.suppress(InputError):  # a corrupt first record: readers of the dataset count it
        first_label = dataset[0]["label"]
    if first_label < 0:
        raise InputError(f"the split {split!r} of {name} has no labels.")
    return dataset


def tfds_builder(name: str, *, data_dir: epath.PathLike | None, **options: Any) -> Any:
    """Calls tfds.builder, and turns its errors into one sentence.

    Raises:
      InputError: the name, configuration or version is unknown, or only TensorFlow can build it.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch(TFDS_NAME, name):
        hint = f": did you mean {FOLDER + name!r}?" if "/" in name or epath.Path(name).exists() else "."
        paths = ", ".join(f"{kind}:PATH" for kind in FILES)
        raise InputError(f"a dataset is named digits, {paths} or NAME[/CONFIG][:VERSION], not {name!r}{hint}")
    try:
        return tfds.builder(name, data_dir=data_dir, **options)
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", *(f"{kind}:PATH" for kind in FILES), *tfds.list_builders(with_community_datasets=False)]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "tensorflow-datasets has none of this name."
        raise InputError(f"unknown dataset {name!r}: {hint}") from error
    except ModuleNotFoundError as error:  # coco's builder needs TensorFlow; reading its prepared files does not
        try:
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            detail = str(error).rpartition(": ")[2]
            raise InputError(f"preparing {name} needs a package that is not installed ({detail}).") from error
    except (AssertionError, ValueError) as error:  # the configuration or the version
        first_line = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"unknown dataset {name!r} ({in_one_sentence(first_line)}).") from error


def _with_classes(
    dataset: TfdsMasks, builder: str, classes: Sequence[str] | None, ignore_label: int, first_label: int
) -> TfdsMasks:
    """The data set with its classes: TFDS_MASKS' ones, or `classes`, or the numbers in this split's masks."""
    if not len(dataset):
        raise InputError(f"the split {dataset.split!r} of {dataset.name} holds no images.")
    check_not_coloured(dataset)
    _, names, first = TFDS_MASKS.get(builder, ("", tuple(classes or ()), first_label))
    if not names:
        table = table_of(range(MOST_CLASSES - first), ignore_label, first=first)
        names = tuple(numbers_in(dataclasses.replace(dataset, table=table)))
    return dataclasses.replace(dataset, classes=names, table=table_of(range(len(names)), ignore_label, first=first))


def annotated_image(builder: Any, annotation: str | None = None) -> tuple[str, str]:
    """The names of two features: the one that holds the image, and the one that holds its label, objects or mask.

    Args:
      builder: a builder of tensorflow-datasets.
      annotation: as in `load_dataset`.

    Raises:
      InputError: the data set has no such features, or is one of UNUSABLE.
    """
    import tensorflow_datasets as tfds

    if builder.name in UNUSABLE:
        raise InputError(f"{builder.name} of tensorflow-datasets cannot be used, because {UNUSABLE[builder.name]}.")
    features = builder.info.features
    has_objects = "objects" in features and isinstance(features["objects"], tfds.features.Sequence)
    # Only objects with several features have keys, and only those can have boxes.
    if has_objects and {"bbox", "label"} <= set(getattr(features["objects"].feature, "keys", tuple)()):
        return "image", "objects"
    mask = TFDS_MASKS[builder.name][0] if builder.name in TFDS_MASKS else _only_mask(features)
    has_label = isinstance(dict(features).get("label"), tfds.features.ClassLabel)
    if mask is not None and (annotation == "mask" or not has_label):
        return "image", mask
    names = builder.info.supervised_keys or ("image", "label")
    image, label = (features[name] if isinstance(name, str) and name in features else None for name in names[:2])
    if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype).kind != "u":
        raise InputError(f"the dataset {builder.name} has no labelled images: its features are {', '.join(features)}.")
    if not isinstance(label, tfds.features.ClassLabel):
        raise InputError(f"the labels of the dataset {builder.name} are not classes.")
    return names[0], names[1]


def _only_mask(features: Any) -> str | None:
    """The one image beside the feature "image", which has to be its mask; None if there is none, or several."""
    import tensorflow_datasets as tfds

    images = [name for name in features if isinstance(features[name], tfds.features.Image)]
    return next(name for name in images if name != "image") if "image" in images and len(images) == 2 else None


def prepare_command(name: str, data_dir: epath.PathLike | None) -> str:
    """The command that prepares a tensorflow-datasets data set."""
    return f"python -m castling_jax prepare {name}" + (f" --data_dir={data_dir}" if data_dir else "")


def _unreadable(builder: Any, name: str, split: str, data_dir: epath.PathLike | None, error: Exception) -> InputError:
    """The error that says why a split cannot be read."""
    if not builder.is_prepared():
        return InputError(f"{name} is not prepared in '{builder.data_path}'; run {prepare_command(name, data_dir)}.")
    if isinstance(error, NotImplementedError):
        return InputError(
            f"'{builder.data_path}' is prepared as {builder.info.file_format.value}, which cannot be read at random "
            f"access: remove it, or choose another data_dir, and run {prepare_command(name, data_dir)}."
        )
    for part in re.findall(r"(?:^|\+)\s*([\w-]+)", split):  # the names in "train[:90%]+test"
        try:
            check_known(f"split of {name}", part, builder.info.splits)
        except InputError as unknown:
            return unknown
    return InputError(f"the split {split!r} of {name} cannot be read ({in_one_sentence(error)}).")
