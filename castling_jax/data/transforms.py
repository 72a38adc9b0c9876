"""Evaluation's transform of one example: any image in, pixels of the model's size out."""

import dataclasses
from typing import Any

from castling_jax.data.geometry import evaluation_view, opened, size_of
from castling_jax.data.pixels import example_image
from castling_jax.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Applies a `Preprocessing` to an example's image; JPEGs are decoded at full scale. It can be pickled."""

    preprocessing: Preprocessing

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its image as `example_image` returns it, [height, width, 3]; all else stays as it is.

        Raises:
          InputError: the image cannot be decoded.
        """
        image = opened(example["image"])
        view = evaluation_view(size_of(image, self.preprocessing), self.preprocessing)
        return example | {"image": example_image(view.image(image, self.preprocessing), self.preprocessing)}
