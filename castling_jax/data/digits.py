"""scikit-learn's handwritten digits, and their splits, without importing scikit-learn, which takes two seconds."""

import base64
from importlib import metadata
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

SPLITS = ("train", "test", "minitrain", "minival")
IMAGES = 1797
FILE = "sklearn/datasets/data/digits.csv.gz"  # part of scikit-learn's wheel: a line has 64 pixels, 0 to 16, and a label
# A bit for each image. `tests/data/test_sources.py` draws both splits anew, with scikit-learn's train_test_split.
TEST = (
    "AAAEiDUkEEAABkEAk0IFABoACAEAJAAoBiwSABAAlAoAkBkSBCD4oAKBEKAACAqIIEQVJElCQKAKAAAAQATYAACBgCAASAXEABBA"
    "CKAQAAVASAAwEAACDsQJAAIkhACDqAE8IKaYCgAAAAsIQAgEoBhIAgJAQcEAgARARoQ3aoECFgBEgABAQqCkGApQAIQLhWHGCBCA"
    "CABMgMAgBAaOAAEIggCBADgIA8AIGQAAEA4BAIQQoCEAMygpBMBEwIBoDgECgwCCAIgipkAsJAQhCKhggJCBoAwCggJCEgE4pBUA"
)
MINIVAL = (
    "BAUABQBKggKIkAQiIABCAAEAAHAGAAAEAIAMQgAAAHWQYAIAEgAAAgAKIBBAgAAARgAiAgAsBQAFAACDkOACREAAIEBgAAIgUCAA"
    "EAAAAEAFIgQCCByAQBAAAQAACBIIBApBFAAAAJAgiDAgBAIpGICFIACYAAIRKQICCBAAAADACCkACgEQFUIRYIAuqCIECBoIoCgA"
    "hgECDAhEAAAAQAIEQQAwAkGAUAAAhEAJChGEigkgAIhACNAGCBUYAAuUQAAFFBQASgAAEDYAEABYABUAIERiAAERBAAALQACAAK4"
)


def read_digits(split: str) -> tuple[Float[np.ndarray, "images 8 8"], Int[np.ndarray, "images"]]:
    """The images of one of SPLITS, with pixels from 0 to 16, and their labels."""
    table = _table()[_members(split)]
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)


def _members(split: str) -> Bool[np.ndarray, "images"]:
    """Which images a split has."""
    held_out, minival = (
        np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=IMAGES).astype(bool)
        for text in (TEST, MINIVAL)
    )
    return {"train": ~held_out, "test": held_out, "minitrain": ~held_out & ~minival, "minival": minival}[split]


def _table() -> Float[np.ndarray, "images columns"]:
    path = Path(str(metadata.distribution("scikit-learn").locate_file(FILE)))
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # knows where a scikit-learn that was not installed as a wheel has it

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])
