"""Where results are kept, and how a result stores the correct answers to all images."""

import base64
from pathlib import Path

import numpy as np
from jaxtyping import Bool

RESULTS = Path(__file__).parent / "results"  # RESULTS/STUDY/RUN.json
SPEED_FILE = RESULTS / "speed.json"  # inference times, which experiments.speed measures
ORIGIN_FILE = "origin.json"  # in RESULTS/STUDY: the commit, and the hashes of the code and of the study's file


def pack(correct: Bool[np.ndarray, "images"]) -> str:
    """One bit for each image, in base64: a result of 10,000 images stays under 2 kB."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(packed: str, images: int) -> Bool[np.ndarray, "images"]:
    """The inverse of `pack`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=images).astype(bool)
