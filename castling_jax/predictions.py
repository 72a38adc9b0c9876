"""What a trained model says of images: names with probabilities, or features. Images of any number are streamed."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from castling_jax.convert.inference import to_inference
from castling_jax.convert.weights import Weights, read
from castling_jax.data.folder import IMAGE_SUFFIXES, image_files
from castling_jax.data.preprocess import named_images, read_image
from castling_jax.data.transforms import EvalTransform
from castling_jax.errors import InputError
from castling_jax.fields import integer
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, apply, features
from castling_jax.storage import as_path

BATCH = 32
BATCHES_AHEAD = 2  # are being read while one is computed
THREADS = 8
Answer = list[tuple[str, float]]
Forward = Callable[[Model, Variables, jax.Array], jax.Array]


def predict(
    path: str | os.PathLike, images: Any, *, top: int = 5, classes: Sequence[str] | None = None
) -> list[Answer]:
    """The most probable classes of images, by the inference form of a trained model.

    The numbers are those of the run's evaluation: images are prepared in the same way.

    Args:
      path: as `castling_jax.convert.read` takes it: a run, a checkpoint, an inference folder, or shipped weights' name.
      images: one or a list; a file, a folder, whose images in folders below count too, in sorted order, or whatever
        else `castling_jax.preprocess` takes: arrays, Pillow's images, bytes.
      top: how many classes, or all where there are fewer.
      classes: the classes' names. None: those that are kept beside the weights.

    Returns:
      For each image [(class, probability), ...], the most probable first.

    Raises:
      InputError: weights or an image cannot be read, a folder holds no images, or the classes have no names.
    """
    integer(1).check("top", top)
    weights = read(path)
    names = class_names(weights, classes)
    answers = []
    for _, probabilities in stream(weights, images, class_probabilities):
        if isinstance(probabilities, InputError):
            raise probabilities
        answers.append(rank(probabilities, names, top))
    return answers


def class_names(weights: Weights, classes: Sequence[str] | None = None) -> list[str]:
    """The names of the model's outputs: `classes`, or those beside the weights.

    Raises:
      InputError: there are none, or not as many as outputs.
    """
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise InputError(f"classes must be a list of names, not {type(classes).__name__}.")
    names = classes if classes is not None else weights.classes
    if names is None:
        raise InputError(f"'{weights.path}' does not say the names of its classes: give classes, a list of names.")
    outputs = None if weights.model is None else weights.model.spec.num_classes
    if outputs is not None and len(names) != outputs:
        raise InputError(f"classes must be the names of the model's {outputs:,} outputs, not {len(names):,} names.")
    return list(names)


def rank(probabilities: Float[np.ndarray, "classes"], names: Sequence[str], top: int) -> Answer:
    """The `top` most probable classes, the first of equals first."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(names[index], float(probabilities[index])) for index in order]


def class_probabilities(
    model: Model, variables: Variables, images: Float[jax.Array, "batch height width channels"]
) -> Float[jax.Array, "batch classes"]:
    """The softmax of the logits."""
    return jax.nn.softmax(apply(model, variables, images))


def mean_features(
    model: Model, variables: Variables, images: Float[jax.Array, "batch height width channels"]
) -> Float[jax.Array, "batch channels"]:
    """The mean of the last stage's tokens, in float32; a DeiT's class token is not among them."""
    return features(model, variables, images)[-1].astype(jnp.float32).mean((1, 2))


def stream(
    weights: Weights, images: Any, forward: Forward, *, batch_size: int = BATCH
) -> Iterator[tuple[Any, np.ndarray | InputError]]:
    """What `forward` gives for each image, in order; images are read as they are needed.

    Args:
      weights: with a model and its preprocessing.
      images: as `predict` takes them.
      forward: (model in inference form, its variables, images [batch, size, size, 3]) -> an array [batch, ...].
      batch_size: images that are computed together; the last batch is filled up, so that one program serves all.

    Yields:
      (the image as it was given, or its path where a folder was; its array, or an InputError that names it and says why
      it cannot be read).

    Raises:
      InputError: there are no images, or the weights do not say what their model or its images are.
    """
    if weights.model is None or weights.preprocessing is None:
        what = "which model it is of" if weights.model is None else "how an image becomes its model's input"
        raise InputError(f"'{weights.path}' does not say {what}, as runs and inference folders do.")
    model = abstract_model(**weights.model.spec.arguments(form="inference"))
    variables = jax.device_put(to_inference(weights.variables))
    transform = EvalTransform(weights.preprocessing)
    compute = jax.jit(functools.partial(forward, model))

    def prepare(name: str, image: Any) -> np.ndarray | InputError:
        try:
            return transform({"image": read_image(image), "label": 0})["image"]
        except InputError as error:
            return InputError(f"{name}: {error}")

    def computed(batch: list[tuple[Any, Future[Any]]]) -> Iterator[tuple[Any, np.ndarray | InputError]]:
        prepared = [(image, future.result()) for image, future in batch]
        good = [pixels for _, pixels in prepared if not isinstance(pixels, InputError)]
        if good:
            padded = np.concatenate([np.stack(good), np.zeros((batch_size - len(good), *good[0].shape), np.float32)])
            found = iter(np.asarray(compute(variables, padded)))
        for image, pixels in prepared:
            yield image, pixels if isinstance(pixels, InputError) else next(found)

    def start(name: str, image: Any) -> Future[Any]:
        """Has a file prepared by another thread. An image in memory is prepared here: its owner may change it next."""
        if isinstance(image, str | os.PathLike | bytes):
            return pool.submit(prepare, name, image)
        prepared: Future[Any] = Future()
        prepared.set_result(prepare(name, image))
        return prepared

    sources = each_image(images)
    waiting: collections.deque[list[tuple[Any, Future[Any]]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := [(image, start(name, image)) for name, image in itertools.islice(sources, batch_size)]:
            waiting.append(batch)
            if len(waiting) > BATCHES_AHEAD:
                yield from computed(waiting.popleft())
        while waiting:
            yield from computed(waiting.popleft())


def each_image(images: Any) -> Iterator[tuple[str, Any]]:
    """(name for a person, image) of each image, those in folders among them; at least one.

    Raises:
      InputError: there is none, or a folder holds none.
    """
    count = 0
    for name, image in named_images(images):
        for each in _files_of(image) if isinstance(image, str | os.PathLike) else [(name, image)]:
            count += 1
            yield each
    if not count:
        raise InputError("there must be at least one image, and there is none.")


def _files_of(path: str | os.PathLike) -> Iterator[tuple[str, epath.Path]]:
    """A file as it is; of a folder, the images in it and in the folders below."""
    root = as_path(path, "an image")
    if not root.is_dir():
        yield f"'{root}'", root
        return
    skipped: collections.Counter[str] = collections.Counter()
    found = sorted(image_files(root, "", skipped))
    if not found:
        others = f", only {sum(skipped.values()):,} other files" if skipped else ""
        raise InputError(f"'{root}' holds no images{others} ({', '.join(IMAGE_SUFFIXES)}).")
    for file in found:
        yield f"'{root / file}'", root / file
