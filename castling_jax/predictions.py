"""A trained model's predictions for images: classes, objects, masks or features. Images are streamed in any number."""

import collections
import itertools
import operator
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
from castling_jax.errors import InputError
from castling_jax.fields import integer, number, plain
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, features
from castling_jax.normalization import model_input
from castling_jax.postprocessing import SHOWN_SCORE
from castling_jax.preprocessing import Preprocessing
from castling_jax.storage import as_path
from castling_jax.tasks.images import finish_images
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.task import Batch, Example, Predictions, seen_images

BATCH = 32
BATCHES_AHEAD = 2  # batches that are read while another one is computed
THREADS = 8
Answer = Any  # as the task's `Predictions.answer` returns it
Forward = Callable[[Model, Variables, Batch], Any]


def predict(
    path: str | os.PathLike,
    images: Any,
    *,
    top: int | None = None,
    score_threshold: float = SHOWN_SCORE,
    classes: Sequence[str] | None = None,
) -> list[Answer]:
    """The most probable classes of images, the objects in them, or their pixels' classes, by a model's inference form.

    Images are prepared as in the run's evaluation, so the numbers are the same.

    Args:
      path: the weights, as `castling_jax.convert.read` takes them: a run, a checkpoint, an inference folder, or the
        name of shipped weights.
      images: one image or a list. An image is a file, a folder (its images and those in folders below, sorted), or
        anything else that `castling_jax.preprocess` takes: an array, a Pillow image, bytes.
      top: largest number of classes or objects to return for each image; None returns 5 classes, or all objects.
      score_threshold: smallest score of an object; classifiers do not use it.
      classes: names of the classes. None takes the names that are kept beside the weights.

    Returns:
      For each image [(class, probability), ...], the most probable first; from a detector
      [(class, score, (x0, y0, x1, y1)), ...] in pixels of the image itself, best first; from a segmenter the number of
      each pixel's class, uint8 [height, width], at the image's own size; from a masked autoencoder "original",
      "masked" and "reconstruction", uint8 [height, width, 3] at the model's size, and "loss", in a dict.

    Raises:
      InputError: weights or an image cannot be read, a folder holds no images, or the classes have no names.
    """
    top, score_threshold = plain(top), plain(score_threshold)
    if top is not None:
        integer(1).check("top", top)
    number("[0, 1]").check("score_threshold", score_threshold)
    weights = read(path)
    names = class_names(weights, classes)
    predictions = predictions_of(weights, names, top=top, score_threshold=score_threshold)
    answers = []
    for _, answer in stream_predictions(weights, images, predictions):
        if isinstance(answer, InputError):
            raise answer
        answers.append(answer)
    return answers


def stream_predictions(
    weights: Weights, images: Any, predictions: Predictions
) -> Iterator[tuple[Any, Answer | InputError]]:
    """Yields (image, its answer as `predict` returns it, or the InputError of an image that cannot be read)."""
    for image, found in stream(weights, images, predictions.compute, batch_size=predictions.batch_size):
        yield image, found if isinstance(found, InputError) else predictions.answer(found)


def predictions_of(
    weights: Weights, names: Sequence[str], *, top: int | None = None, score_threshold: float = SHOWN_SCORE
) -> Predictions:
    """What the weights' model says about images.

    Args:
      weights: the weights.
      names: names of the model's classes.
      top: as in `predict`.
      score_threshold: as in `predict`.

    Raises:
      InputError: the weights do not state their model or its preprocessing.
    """
    model, preprocessing = known_of(weights)
    return task_of(model).predictions(
        names, preprocessing, weights.suppression, top, score_threshold, weights.category_ids
    )


def known_of(weights: Weights) -> tuple[Model, Preprocessing]:
    """The weights' model and its preprocessing.

    Raises:
      InputError: the weights do not state them.
    """
    if weights.model is None or weights.preprocessing is None:
        lack = "which model it belongs to" if weights.model is None else "how an image becomes its model's input"
        raise InputError(f"'{weights.path}' does not say {lack}, as runs and inference folders do.")
    return weights.model, weights.preprocessing


def class_names(weights: Weights, classes: Sequence[str] | None = None) -> list[str]:
    """The names of the model's outputs: `classes` if given, else the names that are kept beside the weights.

    A masked autoencoder needs none: [] if its images had no labels.

    Raises:
      InputError: there are no names, or not as many as the model has outputs.
    """
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise InputError(f"classes must be a list of names, not {type(classes).__name__}.")
    names = classes if classes is not None else weights.classes
    if weights.model is not None and task_of(weights.model).annotation is None:
        return list(names or [])
    if names is None:
        raise InputError(f"'{weights.path}' does not say the names of its classes: give classes, a list of names.")
    outputs = None if weights.model is None else weights.model.spec.num_classes
    if outputs is not None and len(names) != outputs:
        raise InputError(f"classes must be the names of the model's {outputs:,} outputs, not {len(names):,} names.")
    return list(names)


def mean_features(model: Model, variables: Variables, batch: Batch) -> Float[jax.Array, "batch channels"]:
    """The mean of the last stage's patch tokens, in float32, without a DeiT's class token."""
    last = features(model, variables, seen_images(batch))[-1].astype(jnp.float32)
    return last.reshape(len(batch["image"]), -1, last.shape[-1]).mean(1)


def stream(weights: Weights, images: Any, forward: Forward, *, batch_size: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """Computes `forward` for each image, in order; images are read as they are needed.

    Args:
      weights: weights that come with their model and its preprocessing.
      images: the images, as `predict` takes them.
      forward: (model in inference form, its variables, batch of the task's `eval_transform` with finished images) ->
        arrays [batch, ...].
      batch_size: number of images that are computed together.

    Yields:
      (image, rows): the image as the caller gave it, or its path if the caller gave a folder; and its rows of
      `forward`'s arrays, or an InputError that names the image and says why it cannot be read.

    Raises:
      InputError: there are no images, or the weights do not state their model or its preprocessing.
    """
    source, preprocessing = known_of(weights)
    if preprocessing.crop_mode == "slide":  # images differ in the number of their windows
        batch_size = 1
    model = abstract_model(**source.spec.arguments(form="inference"))
    # The variables go to the device once, not with every batch.
    variables = jax.device_put(to_inference(weights.variables))
    transform = task_of(model).eval_transform(preprocessing)
    compute = jax.jit(lambda variables, batch: forward(model, variables, finish_images(batch, preprocessing)))

    def prepare(name: str, image: Any) -> Example | InputError:
        try:
            return transform({"image": read_image(image)})
        except InputError as error:
            return InputError(f"{name}: {error}")

    def computed(batch: list[tuple[Any, Future[Any]]]) -> Iterator[tuple[Any, Any]]:
        prepared = [(image, future.result()) for image, future in batch]
        # An image that cannot be read takes no place in the batch: its neighbours are computed all the same.
        good = [example for _, example in prepared if not isinstance(example, InputError)]
        if good:
            if len({example["image"].dtype for example in good}) > 1:  # floats of the caller's among uint8 images
                good = [one | {"image": model_input(one["image"], preprocessing)} for one in good]
            # Copies of the last image fill the batch, because another batch size would compile another program.
            padded = good + good[-1:] * (batch_size - len(good))
            arrays = jax.device_get(compute(variables, jax.tree.map(lambda *rows: np.stack(rows), *padded)))
            rows = iter(range(len(good)))
        for image, example in prepared:
            if isinstance(example, InputError):
                yield image, example
            else:
                yield image, jax.tree.map(operator.itemgetter(next(rows)), arrays)

    def start(name: str, image: Any) -> Future[Any]:
        """Prepares a file in another thread, but an image in memory here, because its owner may change it next."""
        if isinstance(image, str | os.PathLike | bytes):
            return pool.submit(prepare, name, image)
        prepared: Future[Any] = Future()
        prepared.set_result(prepare(name, image))
        return prepared

    sources = each_image(images)
    waiting: collections.deque[list[tuple[Any, Future[Any]]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        # Batches wait in order while the threads read them, and the oldest is computed once BATCHES_AHEAD others wait.
        while batch := [(image, start(name, image)) for name, image in itertools.islice(sources, batch_size)]:
            waiting.append(batch)
            if len(waiting) > BATCHES_AHEAD:
                yield from computed(waiting.popleft())
        while waiting:
            yield from computed(waiting.popleft())


def each_image(images: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name for messages, image) for each image, with a folder's images one by one.

    Raises:
      InputError: there is no image at all, or a folder holds no images.
    """
    count = 0
    for name, image in named_images(images):
        for each in _files_of(image) if isinstance(image, str | os.PathLike) else [(name, image)]:
            count += 1
            yield each
    if not count:
        raise InputError("there must be at least one image, and there is none.")


def _files_of(path: str | os.PathLike) -> Iterator[tuple[str, epath.Path]]:
    """Yields the path itself if it is a file, else the images in the folder and in folders below it."""
    root = as_path(path, "an image")
    if not root.is_dir():
        yield f"'{root}'", root
        return
    skipped: collections.Counter[str] = collections.Counter()
    files = sorted(image_files(root, "", skipped))
    if not files:
        others = f", only {sum(skipped.values()):,} other files" if skipped else ""
        raise InputError(f"'{root}' holds no images{others} ({', '.join(IMAGE_SUFFIXES)}).")
    for file in files:
        yield f"'{root / file}'", root / file
