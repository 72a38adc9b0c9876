"""How good a model's features are: a classifier of the nearest neighbours, and a linear one, on features in a file."""

import os
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
    """What a file of features holds, in the order of the images."""

    features: Float[np.ndarray, "images channels"]
    labels: Shaped[np.ndarray, "images"]  # the name of the folder that an image is in, below the one that was given
    files: Shaped[np.ndarray, "images"]


def save_features(path: str | os.PathLike, images: str | os.PathLike, out: str | os.PathLike) -> Features:
    """Writes the features of a folder's images, `castling_jax.predictions.mean_features`, as an .npz file.

    Args:
      path: of the weights, as `castling_jax.convert.read` takes it.
      images: a folder. The folders in it are the labels.
      out: the file.

    Raises:
      InputError: an image cannot be read, there is none, or the file cannot be written.
    """
    root, target = as_path(images, "a folder of images"), Path(as_path(out, "--out"))
    if target.suffix != ".npz":
        raise InputError(f"the file of features must end in .npz, not '{target}'.")
    try_file(target)
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
    found = Features(np.stack(vectors), np.array(labels), np.array(names))
    temporary = target.with_name(f".{os.getpid()}.{target.name}")  # savez adds .npz to any other name
    try:
        np.savez_compressed(temporary, **found._asdict())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def read_features(path: str | os.PathLike) -> Features:
    """What `save_features` wrote.

    Raises:
      InputError: there is no such file, or it holds something else.
    """
    with refusing((OSError, ValueError, KeyError), f"'{path}' is no file of features"), np.load(as_path(path)) as file:
        found = Features(*(file[name] for name in Features._fields))
    if not all(found.labels):
        raise InputError(f"'{path}' has images without a label: they have to be in a folder for each class.")
    return found


def probe(train: Features, test: Features, *, neighbours: int = NEIGHBOURS) -> dict[str, Any]:
    """The accuracy on `test` of two classifiers that learn from `train`, in scikit-learn's implementation.

    Nothing is chosen by `test`: k-NN votes among the nearest by cosine similarity, and the linear classifier is a
    logistic regression of standardised features with scikit-learn's own penalty, C = 1.

    Raises:
      InputError: the features have other sizes, `test` has a label that `train` does not have, or there are fewer
        images than neighbours.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_at_least("neighbours", neighbours, 1)
    check_at_most("neighbours", neighbours, len(train.labels), "the images to learn from")
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(
            f"features of {train.features.shape[1]} and of {test.features.shape[1]} channels are of different models."
        )
    if len({*train.labels}) < 2:
        raise InputError(f"two labels at least are needed to tell apart, not {str(train.labels[0])!r} alone.")
    if unknown := sorted({*test.labels} - {*train.labels}):
        raise InputError(f"there is nothing to learn {str(unknown[0])!r} from: no image to learn from has this label.")
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
