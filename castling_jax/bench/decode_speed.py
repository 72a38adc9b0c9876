"""Times how training reads images: JPEGs -> random resized crops of 224 x 224, by the CPU time that they take.

Pillow, which decodes the whole image, is timed beside it, and where TensorFlow is installed tf.data's fused
decode_and_crop_jpeg. The recipes' whole transform, as configs/deit.py has it, is timed too.
"""

import functools
import importlib.util
import io
import itertools
import time
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image

from castling_jax.data.decode import Box, image_size, read_crop
from castling_jax.data.geometry import random_resized_crop_box
from castling_jax.preprocessing import Preprocessing
from castling_jax.tables import aligned
from castling_jax.tasks.classification.transforms import train_transform
from castling_jax.training.config_files import load_config
from castling_jax.training.timing import interleaved_seconds, spread

SIDE = 224
SIZES = ((375, 500), (1500, 2000))  # ImageNet's usual size, and a camera's
QUALITY = 90  # gives files of about 100 kB at the first size, as ImageNet's
SCALE = (0.08, 1.0)
WHOLE = "Pillow, whole images"
RECIPE = "deit:small"  # the configuration whose transform is timed
Crop = tuple[bytes, Box]
Reader = Callable[[list[Crop]], Callable[[], object]]  # crops -> a call that reads all of them


def synthetic_crops(count: int, height: int, width: int) -> list[Crop]:
    """JPEGs of noise that is equally strong at every scale, as photographs are, each with a box to crop."""
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(count):
        image = np.full((height, width, 3), 128.0)
        for cells in (3, 6, 12, 25, 50, 100, 200):
            noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image += 0.35 * (np.asarray(smooth, float) - 128)
        file = io.BytesIO()
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        data = file.getvalue()
        crops.append((data, random_resized_crop_box(image_size(data), SCALE, rng)))
    return crops


def _one_by_one(read: Callable[[bytes, Box], object]) -> Reader:
    def read_all(crops: list[Crop]) -> None:
        for data, box in crops:
            read(data, box)

    return lambda crops: lambda: read_all(crops)


def _ours(data: bytes, box: Box, *, interpolation: str = "bicubic") -> np.ndarray:
    return np.asarray(read_crop(data, box, (SIDE, SIDE), interpolation))


def _recipe(crops: list[Crop], *, interpolation: str, flips_only: bool) -> Callable[[], object]:
    """All that the loader does to an image in training: crop, flip, and RandAugment and erasing unless flips_only."""
    config = load_config(RECIPE)
    if flips_only:
        config.augment.update(randaugment=None, erasing=0.0)
    transform = train_transform(config.augment, Preprocessing(SIDE, interpolation=interpolation))

    def read_all() -> None:
        rng = np.random.default_rng(0)
        for data, _ in crops:
            transform({"image": data, "label": 0}, rng)

    return read_all


def _whole(data: bytes, box: Box) -> np.ndarray:
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _tensorflow(crops: list[Crop], *, method: str = "bicubic", antialias: bool = True) -> Callable[[], object]:
    import tensorflow as tf

    def read(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_and_crop_jpeg(data, box, channels=3)
        return tf.image.resize(image, (SIDE, SIDE), method, antialias=antialias)

    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    data, boxes = zip(*crops, strict=True)
    images = tf.data.Dataset.from_tensor_slices((list(data), np.array(boxes, np.int32))).map(read).with_options(options)
    return lambda: [None for _ in images.as_numpy_iterator()]


def find_readers() -> tuple[dict[str, Reader], list[str]]:
    """The readers that are installed, by name, and a sentence on each of the others."""
    readers: dict[str, Reader] = {
        WHOLE: _one_by_one(_whole),
        "castling_jax": _one_by_one(_ours),
        "castling_jax, bilinear": _one_by_one(functools.partial(_ours, interpolation="bilinear")),
    }
    for flips_only, name in ((True, "transform: crop and flip"), (False, f"transform: {RECIPE}")):
        for interpolation in ("bicubic", "bilinear"):
            readers[f"{name}, {interpolation}"] = functools.partial(
                _recipe, interpolation=interpolation, flips_only=flips_only
            )
    if not importlib.util.find_spec("tensorflow"):
        return readers, ["TensorFlow is not installed: tf.data's decode_and_crop_jpeg is left out."]
    readers["tf.data, cropped"] = _tensorflow
    readers["tf.data, cropped, bilinear"] = functools.partial(_tensorflow, method="bilinear")
    readers["tf.data, cropped, not antialiased"] = functools.partial(_tensorflow, antialias=False)
    return readers, []


def measure_reading(repeats: int, *, count: int = 48) -> tuple[list[dict[str, Any]], list[str]]:
    """Times the readers in turns, in seconds of CPU time: what one core reads, however busy the machine is.

    Args:
      repeats: timed calls of each reader.
      count: images in a call, at least 4; a call has a quarter of them at the larger size.

    Returns:
      A row for each size and reader: height, width, kilobytes (of a file), name, images_per_second {min, median, max}
      and ratio_to_pillow {min, median, max}, the ratio of each repeat's speed to WHOLE's in the same repeat; and a
      sentence for each reader that is left out.
    """
    readers, notes = find_readers()
    rows = []
    for (height, width), images in zip(SIZES, (count, count // 4), strict=True):
        crops = synthetic_crops(images, height, width)
        calls = {name: prepare(crops) for name, prepare in readers.items()}
        size = sum(len(data) for data, _ in crops) / images / 1e3
        for name, seconds in (measured := interleaved_seconds(calls, repeats=repeats, clock=time.process_time)).items():
            ratios = [whole / value for whole, value in zip(measured[WHOLE], seconds, strict=True)]
            row = {"height": height, "width": width, "kilobytes": size, "name": name}
            speeds = [images / value for value in seconds]
            rows.append(row | {"images_per_second": spread(speeds), "ratio_to_pillow": spread(ratios)})
    return rows, notes


def describe_reading(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a table for each size of image; `rows` are `measure_reading`'s."""
    lines: list[str] = []
    header = ("", "images/s a core: median", "max", "ratio to Pillow: min", "median", "max")
    for (width, height, size), group in itertools.groupby(rows, itemgetter("width", "height", "kilobytes")):
        title = f"JPEGs of {width} x {height}, {size:.0f} kB each, to random crops of {SIDE} x {SIDE}, by CPU time"
        cells = [
            (
                row["name"],
                *(f"{row['images_per_second'][of]:,.0f}" for of in ("median", "max")),
                *(f"{ratio:.3f}" for ratio in row["ratio_to_pillow"].values()),
            )
            for row in group
        ]
        lines += ["", title, *aligned([header, *cells])]
    return lines
