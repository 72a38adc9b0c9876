"""How fast training's images are read: JPEGs -> random resized crops of 224 x 224.

On one core, beside Pillow decoding the whole image, and tf.data's fused decode_and_crop_jpeg where TensorFlow is
installed.
"""

import functools
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from castling_jax.data.decode import Box, image_size, read_crop
from castling_jax.data.geometry import random_resized_crop_box
from castling_jax.training.timing import interleaved_seconds, spread

SIDE = 224
SIZES = ((375, 500), (1500, 2000))  # ImageNet's usual one, and a camera's
QUALITY = 90  # some 100 kB a file of the first size, as ImageNet's
SCALE = (0.08, 1.0)
WHOLE = "Pillow, whole images"
Crop = tuple[bytes, Box]
Reader = Callable[[list[Crop]], Callable[[], object]]  # prepares a call that reads them all


def synthetic_crops(count: int, height: int, width: int) -> list[Crop]:
    """JPEGs of noise that is as strong at every scale, as photographs are, and a box of each."""
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


def _ours(data: bytes, box: Box) -> np.ndarray:
    return np.asarray(read_crop(data, box, (SIDE, SIDE)))


def _whole(data: bytes, box: Box) -> np.ndarray:
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _tensorflow(crops: list[Crop], *, antialias: bool) -> Callable[[], object]:
    import tensorflow as tf

    def read(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_and_crop_jpeg(data, box, channels=3)
        return tf.image.resize(image, (SIDE, SIDE), tf.image.ResizeMethod.BICUBIC, antialias=antialias)

    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    data, boxes = zip(*crops, strict=True)
    images = tf.data.Dataset.from_tensor_slices((list(data), np.array(boxes, np.int32))).map(read).with_options(options)
    return lambda: [None for _ in images.as_numpy_iterator()]


def find_readers() -> tuple[dict[str, Reader], list[str]]:
    """The readers that are there, by name, and a sentence on each of the others."""
    readers: dict[str, Reader] = {WHOLE: _one_by_one(_whole), "castling_jax": _one_by_one(_ours)}
    if not importlib.util.find_spec("tensorflow"):
        return readers, ["TensorFlow is not installed: tf.data's decode_and_crop_jpeg is left out."]
    for name, antialias in (("tf.data, cropped", True), ("tf.data, cropped, not antialiased", False)):
        readers[name] = functools.partial(_tensorflow, antialias=antialias)
    return readers, []


def measure_reading(repeats: int, *, count: int = 48) -> tuple[list[dict[str, Any]], list[str]]:
    """Times the readers in turns.

    Args:
      repeats: of each.
      count: images that are read each time, at least 4; of the larger size a quarter.

    Returns:
      A row for each size and reader: height, width, kilobytes (of a file), name, images_per_second {min, median, max}
      and ratio_to_pillow {min, median, max}, of each repeat's speed to that of whole images in the same repeat. And
      notes on what was left out.
    """
    readers, notes = find_readers()
    rows = []
    for (height, width), images in zip(SIZES, (count, count // 4), strict=True):
        crops = synthetic_crops(images, height, width)
        calls = {name: prepare(crops) for name, prepare in readers.items()}
        size = sum(len(data) for data, _ in crops) / images / 1e3
        for name, seconds in (measured := interleaved_seconds(calls, repeats=repeats)).items():
            ratios = [whole / value for whole, value in zip(measured[WHOLE], seconds, strict=True)]
            row = {"height": height, "width": width, "kilobytes": size, "name": name}
            speeds = [images / value for value in seconds]
            rows.append(row | {"images_per_second": spread(speeds), "ratio_to_pillow": spread(ratios)})
    return rows, notes


def describe_reading(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table."""
    lines: list[str] = []
    title = None
    for row in rows:
        if title != (title := f"JPEGs of {row['width']} x {row['height']}, {row['kilobytes']:.0f} kB each"):
            lines += ["", f"{title}, to random crops of {SIDE} x {SIDE} on one core"]
            lines += [f"{'':36s}{'images/s':>9s}   ratio to Pillow: min  median     max"]
        ratios = "".join(f"{value:8.3f}" for value in row["ratio_to_pillow"].values()).rjust(41)
        lines.append(f"{row['name']:36s}{row['images_per_second']['median']:9.0f}{ratios}")
    return lines
