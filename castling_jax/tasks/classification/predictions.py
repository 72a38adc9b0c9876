"""A classifier's predictions: the most probable classes of an image."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import UInt8

from castling_jax.errors import InputError, printable
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply
from castling_jax.tasks.classification.answers import TOP
from castling_jax.tasks.task import Batch, Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ClassPredictions(Predictions):
    """An answer is [(class, probability), ...], the most probable first; equal ones keep the order of the classes."""

    def compute(self, model: Model, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        return {"probabilities": jax.nn.softmax(apply(model, variables, batch["image"]))}

    def answer(self, found: Mapping[str, np.ndarray]) -> list[tuple[str, float]]:
        probabilities = found["probabilities"]
        # A stable sort of the negated values: reversing a sort would reverse the ties as well.
        order = np.argsort(-probabilities, kind="stable")[: TOP if self.top is None else self.top]
        return [(self.names[index], float(probabilities[index])) for index in order]

    def text(self, answer: list[tuple[str, float]]) -> str:
        return ", ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in answer)

    def table(self, answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        count = max((len(answer) for _, answer in answers if not isinstance(answer, InputError)), default=0)
        header = [f"{kind}_{place}" for place in range(1, count + 1) for kind in ("class", "share")]
        rows = [["image", *header, "error"]]
        for path, answer in answers:
            unread = isinstance(answer, InputError)
            words = [""] * len(header) if unread else [word for pair in answer for word in pair]
            rows.append([path, *words, answer if unread else ""])
        return rows

    def draw(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> "Figure":
        from castling_jax.plots import draw_predictions  # here, because matplotlib takes half a second to import

        return draw_predictions(images, answers)
