"""How good a model's features are: k-nearest-neighbour and linear classifiers on features in a file."""

import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from tqdm import tqdm

from castling_jax.convert.weights import read
from castling_jax.errors import InputError, check_at_least, check_at_most, refusing
from castling_jax.predictions import each_image, mean_features, stream
from castling_jax.storage import as_path, try_file

NEIGHBOURS = 20


class Features(NamedTuple):
    """The content of a file of features, in the order of the images."""

    features: Float[np.ndarray, "images channels"]
    labels: Shaped[np.ndarray, "images"]  # the first folder of the image's path; "" for an image outside of folders
    files: Shaped[np.ndarray, "images"]  # paths, relative to the folder of images


def save_features(path: str | os.PathLike, images: str | os.PathLike, out: str | os.PathLike) -> Features:
    """Computes `castling_jax.predictions.mean_features` for a folder's images, and writes them as an .npz file.

    Args:
      path: the weights, as `castling_jax.convert.read` takes them.
      images: a folder of images; the names of the folders in it are the labels.
      out: the file to write, NAME.npz.

    Raises:
      InputError: an image cannot be read, there is no image, or the file cannot be written.
    """
    root, target = as_path(images, "a folder of images"), Path(as_path(out, "--out"))
    if target.suffix != ".npz":
        raise InputError(f"the file of features must end in .npz, not '{target}'.")
    try_file(target)  # now: computing the features may take hours
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = read(path)
    files = [file for _, file in each_image(root)]
    vectors = []
    for _, vector in tqdm(stream(weights, files, mean_features), total=len(files), unit="image", disable=None):
        if isinstance(vector, InputError):
            raise vector
        vectors.append(vector)
    names = [str(file.relative_to(root)) if file != root else file.name for file in files]
    labels = [name.split("/")[0] if "/" in name else "" for name in names]
    features = Features(np.stack(vectors), np.array(labels), np.array(names))
    # The suffix .npz comes last, because savez adds it to any other name.
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        np.savez_compressed(temporary, **features._asdict())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return features


def read_features(path: str | os.PathLike) -> Features:
    """Reads a file that `save_features` wrote.

    Raises:
      InputError: there is no such file, it holds something else, an image has no label, or a feature is not finite.
    """
    unreadable = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile)
    with refusing(unreadable, f"'{path}' is no file of features"), np.load(as_path(path)) as file:
        features = Features(*(file[name] for name in Features._fields))
    if features.features.ndim != 2 or len({len(array) for array in features}) > 1:
        raise InputError(f"'{path}' is no file of features: its arrays are not of the same images.")
    if not np.isfinite(features.features).all():
        raise InputError(f"'{path}' has features that are not finite.")
    if not all(features.labels):
        raise InputError(f"'{path}' has images without a label: they have to be in a folder for each class.")
    return features


def probe(train: Features, test: Features, *, neighbours: int = NEIGHBOURS) -> dict[str, Any]:
    """The accuracy on `test` of two classifiers that learn from `train`, in scikit-learn's implementation.

    Nothing is tuned on `test`: k-NN takes a vote of the nearest images by cosine similarity, and the linear classifier
    is a logistic regression on standardised features with scikit-learn's default penalty, C = 1.

    Raises:
      InputError: the two have different numbers of channels, `test` has a label that `train` lacks, `train` has fewer
        than two labels, or fewer images than neighbours.
    """
    # scikit-learn takes a second to import, and `save_features` does not need it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_at_least("neighbours", neighbours, 1)
    check_at_most("neighbours (--neighbours)", neighbours, len(train.labels), "the images to learn from")
    if train.features.shape[1] != test.features.shape[1]:
        channels = f"{train.features.shape[1]} and of {test.features.shape[1]} channels"
        raise InputError(f"features of {channels} come from different models.")
    if len({*train.labels}) < 2:
        raise InputError(f"a probe needs at least two labels to tell apart, not {str(train.labels[0])!r} alone.")
    if unknown := sorted({*test.labels} - {*train.labels}):
        raise InputError(f"no training image has the label {str(unknown[0])!r}, which images of the test have.")
    knn = KNeighborsClassifier(neighbours, metric="cosine").fit(train.features, train.labels)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train.features, train.labels)
    return {
        "knn_accuracy": float(knn.score(test.features, test.labels)),
        "linear_accuracy": float(linear.score(test.features, test.labels)),
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "classes": len({*train.labels}),
        "neighbours": neighbours,
    }
