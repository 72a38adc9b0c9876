"""Resident memory of a loader that reads a folder of JPEGs for many epochs."""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from castling_jax.data.loader import training_batches
from castling_jax.data.sources import load_dataset
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.transforms import train_transform
from castling_jax.training.config import default_config

IMAGES, SIZE, BATCH_SIZE = 2000, 64, 32
LOOKS = 6  # how often the memory is printed, besides the first time


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "train" / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)


def resident_megabytes() -> float:
    """Resident memory of this process and its children, in 10^6 bytes, as Linux counts it."""
    processes = [Path("/proc/self"), *(Path("/proc") / str(child.pid) for child in multiprocessing.active_children())]
    pages = sum(int((process / "statm").read_text().split()[1]) for process in processes)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch_memory(batches: int, workers: int) -> None:
    """Writes small JPEGs to a temporary folder, reads `batches` batches as training does, and prints the memory."""
    augment = default_config().augment
    augment.update({"crop_scale": (0.08, 1.0), "flip": 0.5, "erasing": 0.25})
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        stream = training_batches(
            load_dataset(f"folder:{folder}", "train"),
            batch_size=BATCH_SIZE,
            seed=0,
            transform=train_transform(augment, Preprocessing(SIZE)),
            workers=workers,
        )
        # At the first look all buffers are filled; from then on the memory must stay flat.
        looks = {200, *np.linspace(0, batches, LOOKS + 1, dtype=int)[1:].tolist()}
        start = time.perf_counter()
        for number in range(1, batches + 1):
            next(stream)
            if number in looks:
                rate = number * BATCH_SIZE / (time.perf_counter() - start)
                print(f"{number:6,} batches: {resident_megabytes():7,.1f} MB, {rate:6,.0f} images/s", flush=True)
