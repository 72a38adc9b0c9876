"""Evaluation's transform of one example: any image in, a model's input out."""

import dataclasses
from typing import Any

import numpy as np

from castling_jax.data.geometry import evaluation_view, size_of
from castling_jax.data.pixels import normalize_images
from castling_jax.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Applies a `Preprocessing` to an example's image; JPEGs are decoded at full scale. It can be pickled."""

    preprocessing: Preprocessing

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its image as float32 [image_size, image_size, 3]; all else stays as it is.

        Raises:
          InputError: the image cannot be decoded.
        """
        image = example["image"]
        view = evaluation_view(size_of(image, self.preprocessing), self.preprocessing)
        seen = np.asarray(view.image(image, self.preprocessing))
        return example | {"image": normalize_images(seen, self.preprocessing)}
