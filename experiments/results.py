"""Where results are kept, and how a result holds the answers to all images."""

import base64
from pathlib import Path

import numpy as np
from jaxtyping import Bool

RESULTS = Path(__file__).parent / "results"  # RESULTS/STUDY/RUN.json
ORIGIN_FILE = "origin.json"  # in RESULTS/STUDY: the commit, and the hashes of the code and of the study's file


def pack(correct: Bool[np.ndarray, "images"]) -> str:
    """One bit an image, in base64."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(packed: str, images: int) -> Bool[np.ndarray, "images"]:
    """The answers that `pack` has packed."""
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=images).astype(bool)
