"""A segmenter's predictions: the class of each pixel, at the image's own size."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from castling_jax.data.decode import Size
from castling_jax.errors import InputError, printable
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply
from castling_jax.plots import draw_segmentation
from castling_jax.postprocessing import Suppression
from castling_jax.tasks.task import Batch, Predictions

NAMED = 5  # classes in a line of text
Named = tuple[UInt8[np.ndarray, "height width"], Sequence[str]]  # an answer, and the names of the classes


class MaskPredictions(Predictions):
    """An answer is a map of labels, uint8 [height, width], at the image's own size; a label is its class's number."""

    batch_size = 4  # the logits of a batch come to the host

    @staticmethod
    def compute(model: Model, variables: Variables, batch: Batch, suppression: Suppression) -> dict[str, jax.Array]:
        return apply(model, variables, batch["image"]) | {"size": batch["size"]}

    @staticmethod
    def answer(
        found: Mapping[str, np.ndarray], names: Sequence[str], *, top: int | None, score_threshold: float
    ) -> UInt8[np.ndarray, "height width"]:
        height, width = found["size"].tolist()
        return resized(found["logits"], (height, width)).argmax(-1).astype(np.uint8)

    @staticmethod
    def with_names(answer: UInt8[np.ndarray, "height width"], names: Sequence[str]) -> Named:
        return answer, names

    @staticmethod
    def text(answer: Named) -> str:
        return ", ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in _shares(answer)[:NAMED])

    @staticmethod
    def table(answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        """A line for each class in an image, with its share of the pixels, and one for an image that is unreadable."""
        rows: list[list[Any]] = [["image", "class", "share", "error"]]
        for path, answer in answers:
            if isinstance(answer, InputError):
                rows.append([path, "", "", str(answer)])
            else:
                rows += [[path, name, share, ""] for name, share in _shares(answer)]
        return rows

    @staticmethod
    def draw(images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> Figure:
        _, names = answers[0]
        return draw_segmentation([(image, labels) for image, (labels, _) in zip(images, answers, strict=True)], names)

    @staticmethod
    def label_map(answer: Named) -> UInt8[np.ndarray, "height width"]:
        return answer[0]


def _shares(answer: Named) -> list[tuple[str, float]]:
    """(class, its share of the pixels) of each class in an answer, the largest share first."""
    labels, names = answer
    counts = np.bincount(labels.ravel(), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return [(names[label], float(counts[label] / labels.size)) for label in order if counts[label]]


def resized(logits: Float[np.ndarray, "height width classes"], size: Size) -> Float[np.ndarray, "rows columns classes"]:
    """Logits resized bilinearly on the host, as an evaluation resizes them on the device.

    The size differs from image to image, and JAX would compile a program for each.
    """
    for axis, side in enumerate(size):
        length = logits.shape[axis]
        # Half-pixel centres: pixel i of the result is at i + 0.5 of `side` pixels.
        place = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
        low = np.floor(place).astype(int)
        share = (place - low).astype(np.float32).reshape(-1, *(1,) * (2 - axis))
        below, above = (np.take(logits, index, axis) for index in (low, np.minimum(low + 1, length - 1)))
        logits = below + share * (above - below)
    return logits
