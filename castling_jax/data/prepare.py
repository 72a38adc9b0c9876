"""Prepares a data set for training: downloads it or reads its archives, and writes ArrayRecord files."""

import contextlib
import gzip
import hashlib
import io
import math
import shlex
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from castling_jax.data.annotations import BoxDataset
from castling_jax.data.arrays import npz, npz_splits
from castling_jax.data.decode import image_size
from castling_jax.data.folder import SPLIT_NAMES, folder, folder_splits, list_skipped
from castling_jax.data.loader import some_named
from castling_jax.data.masks import IGNORED, MaskDataset, read_labels
from castling_jax.data.sources import (
    FOLDER,
    Dataset,
    annotated_image,
    find_splits,
    kind_of,
    load_dataset,
    path_of,
    tfds_builder,
)
from castling_jax.errors import InputError, check, in_one_sentence, printable
from castling_jax.storage import try_folder

IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
DEBIAN_ARCHIVES = epath.Path("/usr/share/datasets/fashion-mnist")  # where dataset-fashion-mnist is installed
# Split -> (start of the file's name, the time in the published file's gzip header). Debian's copies equal the published
# files except for gzip's header, which lacks name and time.
FASHION_MNIST = {"train": ("train", 1504176606), "test": ("t10k", 1504176627)}
LARGEST_SIZE = 224  # largest image size, in pixels, that a suggested command has
ANY_IMAGES = f"folder:{LARGEST_SIZE}"  # the configuration for images of any kind
RECIPES = {
    "fashion_mnist": "fashion_mnist",
    "imagenet2012": "deit:small",
}  # data sets with a configuration of their own
IDX_IMAGES, IDX_LABELS = 0x803, 0x801  # magic numbers: unsigned bytes in three dimensions, and in one


def prepare(
    name: str,
    *,
    data_dir: epath.PathLike | None = None,
    manual_dir: epath.PathLike | None = None,
    archives: epath.PathLike | None = None,
    ignore_label: int = IGNORED,
    first_label: int = 0,
) -> str:
    """Prepares a data set unless it is prepared already.

    Args:
      name: name of the data set.
      data_dir: folder of data sets; None is tensorflow-datasets' default.
      manual_dir: folder of archives that the user downloaded; None is tensorflow-datasets' default.
      archives: folder of Fashion-MNIST's files; None is Debian's.
      ignore_label: as in `load_dataset`, for masks:ROOT.
      first_label: as in `load_dataset`, for masks:ROOT.

    Returns:
      A text that describes the prepared data set to the user.

    Raises:
      InputError: the data set is unknown, has no annotations, or lacks something that it needs; or a label is out of
        range.
    """
    if name == "digits":
        return "digits is in scikit-learn's wheel and needs no preparing."
    if name.startswith(FOLDER):
        return _describe_folder(epath.Path(name.removeprefix(FOLDER)).expanduser())
    if kind_of(name) == "images":
        return _describe_images(name)
    if kind_of(name) == "npz":
        return _describe_arrays(name)
    if path_of(name) is not None:
        check(0 <= ignore_label <= 255, f"ignore_label must be from 0 to 255, not {ignore_label}.")
        check(0 <= first_label <= 253, f"first_label must be from 0 to 253, not {first_label}.")
        return _describe_annotated(name, ignore_label, first_label)
    builder = tfds_builder(name, data_dir=data_dir, file_format="array_record")
    annotated_image(builder)  # refuses a data set without annotations now, before hours of work
    if builder.is_prepared():
        return f"{name} was prepared before.\n{_describe_tfds(builder, name, data_dir)}"
    try_folder(builder.data_path)
    if builder.name == "fashion_mnist":
        archives_folder = epath.Path(archives) if archives else DEBIAN_ARCHIVES
        if archives or archives_folder.is_dir():
            _read_from_archives(builder, archives_folder)
    elif archives:
        raise InputError("--archives is for fashion_mnist alone; other data sets take --manual_dir.")
    manual = epath.Path(manual_dir) if manual_dir else builder.data_dir_root / "downloads" / "manual"
    _check_manual(builder, manual)
    _download_and_prepare(builder, name, manual)
    return _describe_tfds(builder, name, data_dir)


def _check_manual(builder: Any, manual: epath.Path) -> None:
    """Raises an InputError unless the folder has the files that must be downloaded by hand."""
    if builder.name == "imagenet2012":
        missing = [archive for archive in IMAGENET_ARCHIVES if not (manual / archive).exists()]
        if missing:
            raise InputError(
                f"imagenet2012 is made from {' and '.join(IMAGENET_ARCHIVES)}, which https://image-net.org/"
                f"download-images gives to registered users, but '{manual}' lacks {' and '.join(missing)}: put them "
                "there, or give their folder as --manual_dir."
            )
    elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not manual.is_dir():
        raise InputError(
            f"{builder.name} needs files that you fetch by hand, into '{manual}' or the folder that --manual_dir names "
            f"({in_one_sentence(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)})."
        )


def _download_and_prepare(builder: Any, name: str, manual: epath.Path) -> None:
    import tensorflow_datasets as tfds

    options = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=options)  # TFDS renames the folder once it is whole
    except Exception as error:  # TFDS raises many kinds
        if _lacks_tensorflow(error):
            debian = ", or apt-get install dataset-fashion-mnist" if builder.name == "fashion_mnist" else ""
            raise InputError(
                f"preparing {name} needs TensorFlow, which training on it does not: pip install tensorflow-cpu"
                f"{debian}, and run this again."
            ) from error
        if isinstance(error, OSError | tfds.download.DownloadError):
            raise InputError(f"{name} could not be fetched or written ({in_one_sentence(error)}).") from error
        raise


def _lacks_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "tensorflow").split(".")[0] == "tensorflow":
            return True
        error = error.__cause__ or error.__context__
    return False


def _read_from_archives(builder: Any, folder: epath.Path) -> None:
    """Makes Fashion-MNIST's builder read its archives from a folder, without TensorFlow.

    Raises:
      InputError: an archive is missing, or is not the published one.
    """
    checksums = {url.rpartition("/")[2]: info.checksum for url, info in builder.url_infos.items()}
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split, (start, time) in FASHION_MNIST.items():
        images, labels = (
            _read_archive(folder / f"{start}-{kind}-ubyte.gz", time, checksums)
            for kind in ("images-idx3", "labels-idx1")
        )
        parts[split] = (_parse_idx(images, IDX_IMAGES), _parse_idx(labels, IDX_LABELS))

    def split_generators(manager: Any) -> dict[str, Any]:
        return {split: _examples(*part) for split, part in parts.items()}

    # TFDS's own generators read through tf.io. TFDS still does the rest, such as shuffling and writing.
    builder._split_generators = split_generators


def _read_archive(path: epath.Path, time: int, checksums: dict[str, str]) -> bytes:
    """The content of a published archive, or of Debian's copy, whose gzip header lacks time and name."""
    if not path.is_file():
        raise InputError(f"there is no archive '{path}'; apt-get install dataset-fashion-mnist brings it.")
    data = path.read_bytes()
    # The published file's header. Debian's copy, with this header instead of its 10 bytes, has the published hash.
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", time) + b"\x00\x03" + path.stem.encode() + b"\x00"
    if checksums[path.name] not in (hashlib.sha256(copy).hexdigest() for copy in (data, header + data[10:])):
        raise InputError(f"'{path}' is not the published archive: its SHA-256 is not {checksums[path.name]}.")
    return gzip.decompress(data)


def _parse_idx(data: bytes, magic: int) -> np.ndarray:
    """The array in an IDX file. The last byte of the magic number is the number of dimensions."""
    dimensions = magic & 0xFF
    file_magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    if file_magic != magic:
        raise InputError(f"an archive's magic number is {file_magic:#x}, not {magic:#x}.")
    return np.frombuffer(data, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields TFDS's (key, example) pairs, with PNGs encoded by Pillow.

    TFDS sorts the examples by these keys. They are the keys of TFDS's own builder, so the order is the same.
    """
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        yield index, {"image": encoded.getvalue(), "label": int(label)}


def _describe_tfds(builder: Any, name: str, data_dir: epath.PathLike | None) -> str:
    """Describes a data set and the command that trains on it, after loading a split to see that it can be read."""
    splits = builder.info.splits
    dataset = load_dataset(name, next(iter(splits)), data_dir=data_dir)
    option = f" --config.dataset.data_dir={data_dir}" if data_dir else ""
    # No configuration suits every data set with boxes or masks: the user writes the name of one in CONFIG's place.
    recipe = RECIPES.get(builder.name, ANY_IMAGES if dataset.annotation == "label" else "CONFIG")
    leftovers = sorted(path.name for path in builder.data_path.parent.glob("incomplete.*"))
    return "\n".join(
        [
            f"{builder.data_path}: {dataset.num_classes} classes, {builder.info.dataset_size / 1e6:,.0f} MB",
            *(f"  {split}: {info.num_examples:,} images" for split, info in splits.items()),
            *(f"{leftover} was left by an interrupted preparation, and can be removed." for leftover in leftovers),
            "To train on it:",
            f"  python main.py --config={recipe} --config.dataset.name={name}{option}",
        ]
    )


def _describe_folder(path: epath.Path) -> str:
    """Describes a folder of images, and the command that trains on it.

    Raises:
      InputError: as `folder` does.
    """
    train = folder(path, "train")
    lines = [f"{path}: {train.num_classes} classes"]
    # Another folder beside them may hold something else.
    datasets = {name: folder(path, name) for name in folder_splits(path) if name.lower() in SPLIT_NAMES}
    for split, dataset in datasets.items():
        counts = np.bincount(dataset.labels, minlength=train.num_classes)
        lines.append(f"  {printable(split)}: {len(dataset):,} images, {counts.min():,} to {counts.max():,} in a class")
    return "\n".join([*lines, *_describe_skipped(datasets.values()), *_how_to_train(f"{FOLDER}{path}", train)])


def _describe_skipped(datasets: Iterable[Dataset]) -> list[str]:
    """A line on the files that were skipped; none if there are none."""
    skipped = list_skipped(datasets)
    return [f"  skipped, because their names have no image's suffix: {skipped}"] if skipped else []


def _describe_images(name: str) -> str:
    """Describes a folder of images without labels, and the command that learns from it.

    Raises:
      InputError: as `images` does.
    """
    splits = [(split, load_dataset(name, split)) for split in find_splits(name)]
    size = _usual_size(splits[0][1])
    return "\n".join(
        [
            f"{path_of(name)}: images without labels",
            *(f"  {printable(split)}: {len(dataset):,} images" for split, dataset in splits),
            *_describe_skipped(dataset for _, dataset in splits),
            f"To learn from them, with images of {size} x {size} pixels:",
            f"  python main.py --config=images:{size} --config.dataset.name={shlex.quote(name)}",
        ]
    )


def _describe_arrays(name: str) -> str:
    """Describes an archive of labelled images, and the command that trains on it.

    Raises:
      InputError: as `npz` does.
    """
    path = str(path_of(name))
    train = npz(path, "train")
    lines = [f"{path}: {train.num_classes} classes"]
    for split in npz_splits(path):
        dataset = train if split == "train" else npz(path, split, train.classes)
        height, width = dataset.images.shape[1:3]
        lines.append(f"  {printable(split)}: {len(dataset):,} images of {width} x {height} pixels")
    return "\n".join([*lines, *_how_to_train(name, train)])


def _how_to_train(name: str, train: Dataset) -> list[str]:
    """The command that trains on a data set of labelled images; the size is that of `train`'s images."""
    train_split, eval_split = find_splits(name)
    size = _usual_size(train)
    return [
        f"To train on {train_split} and evaluate on {eval_split}, with images of {size} x {size} pixels:",
        f"  python main.py --config=folder:{size} --config.dataset.name={shlex.quote(name)}",
    ]


def _describe_annotated(name: str, ignore_label: int, first_label: int) -> str:
    """Describes the splits that `find_splits` finds: their images and their boxes or masks.

    Raises:
      InputError: as `load_dataset` does.
    """
    lines, classes = [], None
    for split in find_splits(name):
        dataset = load_dataset(name, split, classes=classes, ignore_label=ignore_label, first_label=first_label)
        classes = dataset.classes
        if isinstance(dataset, MaskDataset):
            said = _describe_masks(dataset, split)
        else:
            assert isinstance(dataset, BoxDataset)
            said = (
                f"{dataset.box_counts.sum():,} boxes, at most {dataset.box_counts.max():,} in an image; "
                f"{dataset.dropped:,} boxes without an area in their image are left out"
            )
        lines.append(f"  {printable(split)}: {len(dataset):,} images, {said}")
    lines = [f"{path_of(name)}: {len(classes or ()):,} classes", *lines]
    if isinstance(dataset, MaskDataset):
        size = _usual_size(dataset)
        flags = f" --config.dataset.ignore_label={ignore_label}" if ignore_label != IGNORED else ""
        flags += f" --config.dataset.first_label={first_label}" if first_label else ""
        lines += [
            f"To train on it, with images of {size} x {size} pixels:",
            f"  python main.py --config=masks:{size} --config.dataset.name={shlex.quote(name)}{flags}",
        ]
    return "\n".join(lines)


def _describe_masks(dataset: MaskDataset, split: str) -> str:
    """The largest mask of a split, and the share of the pixels that each class has.

    Raises:
      InputError: a mask cannot be used with its image.
    """
    # Every mask is read here, because training would meet a bad one only after a while.
    faults: dict[str, str] = {}
    sizes, pixels = [], np.zeros(256, np.int64)
    for index in tqdm(range(len(dataset)), desc=f"masks of {printable(split)}", unit="mask", disable=None):
        try:
            example = dataset[index]
            labels = read_labels(example, image_size(example["image"]))
            sizes.append(labels.shape)
            pixels += np.bincount(labels.ravel(), minlength=256)
        except InputError as error:
            faults[dataset.describe(index)] = str(error)
    if faults:
        raise InputError(
            f"{len(faults):,} of the {len(dataset):,} masks of {split} cannot be used: {some_named(faults)}."
        )
    height, width = max(sizes, key=math.prod)
    named = [*zip(dataset.classes, pixels, strict=False), ("without a class", pixels[IGNORED])]
    shares = ", ".join(f"{100 * count / pixels.sum():.1f} % {name}" for name, count in named if count)
    missing = [name for name, count in named[:-1] if not count]
    absent = f"; no mask has {', '.join(missing)}" if missing else ""
    return f"masks of up to {width} x {height} pixels: {printable(shares)}{printable(absent)}"


def _usual_size(dataset: Dataset) -> int:
    """LARGEST_SIZE, or the first image's shorter side if that is less, in pixels."""
    with contextlib.suppress(InputError):  # the first image may be corrupt
        return min(LARGEST_SIZE, *image_size(dataset[0]["image"]))
    return LARGEST_SIZE
