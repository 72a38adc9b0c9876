"""How a detector's outputs become detections: a value kept beside the weights, like the preprocessing."""

import dataclasses
from typing import Any

from castling_jax.fields import integer, number, plain

SHOWN_SCORE = 0.3  # smallest score of a detection that a person is shown
VALUES = {"score_threshold": number("[0, 1)"), "iou_threshold": number("[0, 1]"), "max_detections": integer(1)}


@dataclasses.dataclass(frozen=True)
class Suppression:
    """The arguments of `ops.non_maximum_suppression` in evaluation, predictions and exported programs.

    The defaults are PicoDet's in PaddleDetection.

    Attributes:
      score_threshold: scores at or under it do not count.
      iou_threshold: of two boxes of a class whose IoU is above it, the one with the lower score is dropped.
      max_detections: most detections in an image.

    Raises:
      InputError: a value is out of range.
    """

    score_threshold: float = 0.025
    iou_threshold: float = 0.6
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name, values in VALUES.items():
            value = plain(getattr(self, name))
            values.check(name, value)
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for JSON and as arguments."""
        return dataclasses.asdict(self)
