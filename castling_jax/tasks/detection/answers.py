"""Both forms' detections in each image of a split, and the figures and files made from them."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from jaxtyping import Float, Int

from castling_jax.data.annotations import Annotations, BoxDataset
from castling_jax.data.decode import decode
from castling_jax.errors import InputError
from castling_jax.postprocessing import SHOWN_SCORE
from castling_jax.tasks.task import FORMS

DETECTIONS_FILE = "detections.json"
DRAWN = 12  # images in a picture
# hotcoco's names -> ours; AP is averaged over the IoUs 0.50, 0.55, ..., 0.95, and s, m, l are COCO's sizes of objects.
FIGURES = {
    **{"AP": "mAP", "AP50": "AP50", "AP75": "AP75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"},
    **{"AR1": "AR1", "AR10": "AR10", "AR100": "AR100", "ARs": "AR_small", "ARm": "AR_medium", "ARl": "AR_large"},
}


@dataclasses.dataclass(frozen=True)
class Answered:
    """One form's detections, best first; rows without a detection have the class -1.

    Attributes:
      boxes: (x0, y0, x1, y1) in pixels of the image itself.
      scores: from 0 to 1.
      classes: the classes' numbers, from 0.
    """

    boxes: Float[np.ndarray, "images detections 4"]
    scores: Float[np.ndarray, "images detections"]
    classes: Int[np.ndarray, "images detections"]


@dataclasses.dataclass(frozen=True)
class BoxAnswers:
    """Both forms' detections in the images of a split, in its order; corrupt images are left out.

    Attributes:
      dataset: the split, with the true boxes.
      image: number of each image in the split, from 0.
      train_form: the training form's detections.
      inference_form: the inference form's detections.
      difference: largest difference between the two forms' outputs in each image, as `largest_difference` computes it.
      corrupt: number of corrupt images, which were left out.
      exif: whether images are turned as their EXIF orientation says; boxes are in pixels of the turned image.
    """

    dataset: BoxDataset
    image: Int[np.ndarray, "images"]
    train_form: Answered
    inference_form: Answered
    difference: Float[np.ndarray, "images"]
    corrupt: int
    exif: bool

    def figures(self) -> dict[str, float]:
        """COCO's 12 figures of both forms, as NAME_FORM; max_difference (largest); eval_images and eval_corrupt.

        A figure about objects that the split does not have, such as large ones, is left out.

        Raises:
          InputError: the split has no objects at all, so there is nothing to compare the detections with.
        """
        found = {
            f"{FIGURES[name]}_{form}": float(value)
            for form, evaluation in self._evaluations.items()
            for name, value in evaluation.results()["metrics"].items()
            if value >= 0  # -1: there is no such object
        }
        return found | {
            "max_difference": float(np.max(self.difference)),
            "eval_images": len(self.image),
            "eval_corrupt": self.corrupt,
        }

    def by_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{class: {"images": images with such a box, "boxes": boxes, "mAP": inference form's, or None without boxes}}.

        Crowds are not counted.
        """
        shares = self._evaluations["inference_form"].results(per_class=True)["per_class"]
        found = [one.classes[~one.crowd] for one in self._truth]
        boxes = np.bincount(np.concatenate(found), minlength=len(classes)).tolist()
        images = np.bincount(np.concatenate([np.unique(one) for one in found]), minlength=len(classes)).tolist()
        return {
            name: {
                "images": images[number],
                "boxes": boxes[number],
                "mAP": shares[str(number)] if boxes[number] else None,
            }
            for number, name in enumerate(classes)
        }

    def files(self, classes: Sequence[str]) -> dict[str, bytes]:
        """detections.json, classes.csv, precision_recall.png and detections.png, all of the inference form.

        detections.json has COCO's format for results: image_id, category_id, bbox (x, y, width, height in pixels) and
        score. classes.csv has the average precision of each class. The pictures show precision over recall; and
        the split's first images, with the true boxes on the left and detections from a score of 0.3 on the right.
        """
        from castling_jax.plots import (  # here, because matplotlib takes half a second to import
            draw_detections,
            draw_precision_recall,
            png,
        )

        table = io.StringIO()
        rows = [[name, *row.values()] for name, row in self.by_class(classes).items()]
        csv.writer(table, lineterminator="\n").writerows([["class", "images", "boxes", "mAP"], *rows])
        accumulated: Any = self._evaluations["inference_form"].eval
        precision = accumulated["precision"][:, :, :, 0, -1]  # all sizes of objects, at most 100 detections
        files = {
            DETECTIONS_FILE: json.dumps(self._coco_results()).encode(),
            "classes.csv": table.getvalue().encode(errors="backslashreplace"),
            "precision_recall.png": png(draw_precision_recall(precision, classes)),
        }
        pictures = list(self._pictures(classes))
        return files | ({"detections.png": png(draw_detections(pictures))} if pictures else {})

    @functools.cached_property
    def _evaluations(self) -> dict[str, COCOeval]:
        """COCO's evaluation of each form."""
        images = [{"id": int(place)} for place in self._places]
        categories = [{"id": number, "name": str(number)} for number in range(self.dataset.num_classes)]
        columns = {
            name: np.concatenate([getattr(one, name) for one in self._truth])
            for name in ("boxes", "classes", "areas", "crowd")
        }
        check_objects(self.dataset, self.image)  # again, since the images that have objects may all be corrupt
        expected = COCO.from_arrays(
            images,
            categories,
            image_ids=np.repeat(self._places, [len(one.boxes) for one in self._truth]),
            category_ids=columns["classes"],
            boxes=_width_height(columns["boxes"]),
            area=columns["areas"],
            iscrowd=columns["crowd"],
        )
        evaluations = {}
        for form in FORMS:
            evaluation = COCOeval(expected, expected.load_res(self._rows(getattr(self, form))), "bbox")
            with contextlib.redirect_stdout(io.StringIO()):  # summarize prints the figures
                evaluation.run()
            evaluations[form] = evaluation
        return evaluations

    @functools.cached_property
    def _truth(self) -> list[Annotations]:
        return [self.dataset.annotations(int(index)) for index in self.image]

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, "images"]:
        """Each image's place in the order of the images' ids, in which COCO's evaluation takes equal scores."""
        return np.argsort(np.argsort([one.image_id for one in self._truth], kind="stable"))

    def _rows(self, answered: Answered) -> Float[np.ndarray, "detections 7"]:
        """The detections as hotcoco takes them: image, x, y, width, height, score, class."""
        found = answered.classes >= 0
        images = np.broadcast_to(self._places[:, None], found.shape)[found]
        columns = (images, *_width_height(answered.boxes[found]).T, answered.scores[found], answered.classes[found])
        return np.stack(columns, axis=-1).astype(np.float64)

    def _coco_results(self) -> list[dict[str, Any]]:
        """The inference form's detections as COCO's results, with the ids of the annotations' file.

        Nothing is rounded, since equal scores have another order than those that were rounded.
        """
        ids = {int(place): one.image_id for place, one in zip(self._places, self._truth, strict=True)}
        return [
            {
                "image_id": ids[int(image)],
                "category_id": int(self.dataset.category_ids[int(number)]),
                "bbox": box,
                "score": score,
            }
            for image, *box, score, number in self._rows(self.inference_form).tolist()
        ]

    def _pictures(self, classes: Sequence[str]) -> Any:
        """Yields (image, true boxes, their names, detected boxes, their names, scores) of the split's first images."""
        for place, index in enumerate(self.image[:DRAWN]):
            with contextlib.suppress(InputError):
                encoded, truth, found = self.dataset[int(index)]["image"], self._truth[place], self.inference_form
                image = np.asarray(decode(encoded, exif=self.exif))
                shown = (found.classes[place] >= 0) & (found.scores[place] >= SHOWN_SCORE)
                yield (
                    image,
                    (truth.boxes, [classes[number] for number in truth.classes], None),
                    (
                        found.boxes[place][shown],
                        [classes[number] for number in found.classes[place][shown]],
                        found.scores[place][shown],
                    ),
                )


def check_objects(dataset: BoxDataset, images: Collection[int]) -> None:
    """Raises an InputError if these images of a split have no object other than crowds."""
    for index in images:
        with contextlib.suppress(InputError):  # a corrupt image, which an evaluation leaves out
            if not dataset.annotations(int(index)).crowd.all():
                return
    raise InputError(f"none of the {len(images):,} images has an object that is no crowd: choose another split.")


def _width_height(boxes: Float[np.ndarray, "boxes 4"]) -> Float[np.ndarray, "boxes 4"]:
    """x0, y0, x1, y1 -> x, y, width, height, as COCO has boxes; in float64, since float32 areas would be rounded."""
    wide = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=-1)
