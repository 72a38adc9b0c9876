"""A segmenter's predictions: the class of each pixel, at the image's own size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import UInt8

from castling_jax.errors import InputError, printable
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply
from castling_jax.tasks.segmentation.windows import join_on_host
from castling_jax.tasks.task import Batch, Predictions, seen_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 5  # classes in a line of text
Labels = UInt8[np.ndarray, "height width"]


class MaskPredictions(Predictions):
    """An answer is a map of labels, uint8 [height, width], at the image's own size; a label is its class's number."""

    batch_size = 4  # the logits of a batch come to the host

    def compute(self, model: Model, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        windows = batch["windows"]
        logits = apply(model, variables, seen_images(batch))["logits"]
        by_image = logits.reshape(*windows.shape[:2], *logits.shape[1:])
        return {"logits": by_image, "windows": windows, "size": batch["size"]}

    def answer(self, found: Mapping[str, np.ndarray]) -> Labels:
        height, width = found["size"].tolist()
        return join_on_host(found["logits"], found["windows"], (height, width)).argmax(-1).astype(np.uint8)

    def text(self, answer: Labels) -> str:
        return ", ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in self._shares(answer)[:NAMED])

    def table(self, answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        """A line for each class in an image, with its share of the pixels, and one for an image that is unreadable."""
        rows: list[list[Any]] = [["image", "class", "share", "error"]]
        for path, answer in answers:
            if isinstance(answer, InputError):
                rows.append([path, "", "", str(answer)])
            else:
                rows += [[path, name, share, ""] for name, share in self._shares(answer)]
        return rows

    def draw(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> "Figure":
        from castling_jax.plots import draw_segmentation  # here, because matplotlib takes half a second to import

        return draw_segmentation(list(zip(images, answers, strict=True)), self.names)

    def label_map(self, answer: Labels) -> Labels:
        return answer

    def _shares(self, answer: Labels) -> list[tuple[str, float]]:
        """(class, its share of the pixels) of each class in an answer, the largest share first."""
        counts = np.bincount(answer.ravel(), minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return [(self.names[label], float(counts[label] / answer.size)) for label in order.tolist() if counts[label]]
