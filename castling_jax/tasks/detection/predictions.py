"""A detector's predictions: the objects in an image."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from castling_jax.convert.inference_folder import compute_outputs
from castling_jax.errors import InputError, printable
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables
from castling_jax.tasks.task import Batch, Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = tuple[str, float, tuple[float, ...]]


class BoxPredictions(Predictions):
    """An answer is [(class, score, (x0, y0, x1, y1)), ...], best first; boxes are in pixels of the image itself."""

    def compute(self, model: Model, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        found = compute_outputs(model, variables, batch["image"], suppression=self.suppression)
        return found | {"boxes": in_the_image(found["boxes"], batch)}

    def answer(self, found: Mapping[str, np.ndarray]) -> list[Found]:
        rows = zip(found["classes"], found["scores"], found["boxes"], strict=True)
        listed: list[Found] = [
            (self.names[label], float(score), tuple(map(float, box)))
            for label, score, box in rows
            if label >= 0 and score >= self.score_threshold
        ]
        return listed[: self.top]

    def text(self, answer: list[Found]) -> str:
        return ", ".join(f"{printable(name)} {score:.2f}" for name, score, _ in answer) or "nothing"

    def table(self, answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        """A line for each object, and one for each image without any or that cannot be read."""
        rows = [["image", "class", "score", "x0", "y0", "x1", "y1", "error"]]
        for path, answer in answers:
            if isinstance(answer, InputError):
                rows.append([path, *[""] * 6, str(answer)])
                continue
            rows += [[path, name, score, *box, ""] for name, score, box in answer] or [[path, *[""] * 7]]
        return rows

    def draw(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> "Figure":
        from castling_jax.plots import draw_objects  # here, because matplotlib takes half a second to import

        return draw_objects(images, answers)

    def coco_results(self, answers: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
        ids = dict(zip(self.names, self.category_ids or itertools.count(1), strict=False))
        return [
            {
                "image_id": str(path),
                "category_id": ids[name],
                "category_name": name,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for path, answer in answers
            for name, score, (x0, y0, x1, y1) in answer
        ]


def in_the_image(boxes: Array, batch: Batch) -> Array:
    """Boxes [batch, boxes, 4] in pixels of the model's input -> clipped boxes in pixels of the images."""
    height, width = batch["image"].shape[1:3]
    edges = jnp.tile(batch["size"][:, ::-1], 2)[:, None].astype(jnp.float32)  # x, y, x, y
    return jnp.clip(boxes * (edges / jnp.array([width, height, width, height], jnp.float32)), 0, edges)
