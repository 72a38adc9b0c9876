"""Shows that the memory of a long run stays flat: resident memory of a loader that reads a folder of JPEGs.

    python -m castling_jax.tools.loader_memory [--batches=3000] [--workers=0]

writes small JPEGs to a temporary folder, reads them for many epochs as training does, and prints the resident memory of
this process and its workers on the way.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from castling_jax.data.loader import training_batches
from castling_jax.data.sources import load_dataset
from castling_jax.data.transforms import train_transform
from castling_jax.preprocessing import Preprocessing
from castling_jax.tools.folders import ending_in_a_sentence
from castling_jax.training.config import default_config

IMAGES, SIZE, BATCH_SIZE = 2000, 64, 32
LOOKS = 6  # in a run, besides the first


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "train" / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)


def resident_megabytes() -> float:
    """Of this process and its children, as Linux has it."""
    processes = [Path("/proc/self"), *(Path("/proc") / str(child.pid) for child in multiprocessing.active_children())]
    pages = sum(int((process / "statm").read_text().split()[1]) for process in processes)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    augment = default_config().augment
    augment.update({"crop_scale": (0.08, 1.0), "flip": 0.5, "erasing": 0.25})
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        batches = training_batches(
            load_dataset(f"folder:{folder}", "train"),
            batch_size=BATCH_SIZE,
            seed=0,
            transform=train_transform(augment, Preprocessing(SIZE)),
            workers=options.workers,
        )
        looks = {200, *np.linspace(0, options.batches, LOOKS + 1, dtype=int)[1:].tolist()}
        start = time.perf_counter()
        for number in range(1, options.batches + 1):
            next(batches)
            if number in looks:
                rate = number * BATCH_SIZE / (time.perf_counter() - start)
                print(f"{number:6,} batches: {resident_megabytes():7,.1f} MB, {rate:6,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
