"""Where examples come from: names -> random-access datasets."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from castling_jax.ops.errors import check_known

DIGITS_SPLITS = ("train", "test", "minitrain", "minival")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images in memory: a source for grain.

    Images are in [0, 1] with three channels always: grey ones are repeated, so that every model takes every dataset.
    """

    images: Float[np.ndarray, "examples height width 3"]
    labels: Int[np.ndarray, "examples"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


def digits(split: str) -> Dataset:
    """scikit-learn's handwritten digits: 1,797 real grey images of 8 x 8 pixels.

    Args:
      split: "test", a stratified fifth (always the same), or "train", the rest; and, to choose hyper-parameters
        without a look at the test split, "minival", a stratified fifth of "train", or "minitrain", what that leaves.

    Raises:
      InputError: another split.
    """
    # scikit-learn takes a second to import, and only this dataset needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_known("split of digits", split, DIGITS_SPLITS)
    data = load_digits()
    labels = data.target.astype(np.int32)
    chosen = np.arange(len(labels))
    train, test = train_test_split(chosen, test_size=0.2, stratify=labels, random_state=0)
    if split.startswith("mini"):
        train, test = train_test_split(train, test_size=0.2, stratify=labels[train], random_state=0)
    chosen = np.sort(train if split.endswith("train") else test)
    images = (data.images[chosen] / 16).astype(np.float32)
    return Dataset(np.repeat(images[..., None], 3, axis=-1), labels[chosen], num_classes=10)


DATASETS: dict[str, Callable[[str], Dataset]] = {"digits": digits}


def load_dataset(name: str, split: str) -> Dataset:
    """A split of a dataset by its name.

    Raises:
      InputError: the dataset or the split is unknown.
    """
    check_known("dataset", name, DATASETS)
    return DATASETS[name](split)
