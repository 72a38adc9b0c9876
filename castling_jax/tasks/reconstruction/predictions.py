"""A masked autoencoder's predictions: images with their hidden patches filled in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from castling_jax.errors import InputError
from castling_jax.models.mae import MAE, image_of
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply
from castling_jax.normalization import to_pixels
from castling_jax.tasks.reconstruction.losses import paste, reconstruction_loss
from castling_jax.tasks.task import Batch, Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = np.uint8(128)  # of a hidden patch


class ReconstructionPredictions(Predictions):
    """An answer is {"original", "masked", "reconstruction"}, images uint8 [height, width, 3] of the model's size, and
    "loss". The reconstruction has the visible patches of the image itself."""

    def compute(self, model: Model, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        images, autoencoder = batch["image"], cast(MAE, model)
        size, normalized = autoencoder.backbone.patch_size, autoencoder.norm_pix_loss
        outputs = apply(model, variables, images)
        patches = paste(**outputs, images=images, patch_size=size, normalized=normalized)
        hidden = jnp.broadcast_to(outputs["mask"][:, :, None], patches.shape)
        grid = autoencoder.backbone.grid
        return {
            "original": images,
            "hidden": image_of(hidden, size, grid),
            "reconstruction": image_of(patches, size, grid),
            "loss": reconstruction_loss(**outputs, images=images, patch_size=size, normalize=normalized),
        }

    def answer(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        original, filled = (to_pixels(found[name], self.preprocessing) for name in ("original", "reconstruction"))
        masked = np.where(found["hidden"] > 0, GREY, original)
        return {"original": original, "masked": masked, "reconstruction": filled, "loss": float(found["loss"])}

    def text(self, answer: dict[str, Any]) -> str:
        return f"loss {answer['loss']:.4f}"

    def table(self, answers: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
        rows = [["image", "loss", "error"]]
        for path, answer in answers:
            unread = isinstance(answer, InputError)
            rows.append([path, "", str(answer)] if unread else [path, answer["loss"], ""])
        return rows

    def draw(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Any]) -> "Figure":
        from castling_jax.plots import draw_reconstructions  # here, because matplotlib takes half a second to import

        return draw_reconstructions(answers)
