"""What a model says of each image of a data set, and the figures that come of it."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

TOP = 5  # answers among which the label counts as found, where there are more classes than that
FORMS = ("train_form", "inference_form")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Both forms' answers to the images of a split, in its order; corrupt images are left out.

    Attributes:
      num_classes: of the model.
      image: the number of each image in the split, from 0.
      label: of each image.
      train_form: the class that the training form says.
      inference_form: the class that the inference form says.
      top_train_form: whether the label is among the training form's TOP likeliest classes.
      top_inference_form: likewise.
      loss: cross entropy of the inference form in nats, without smoothing.
      difference: the largest absolute difference between the two forms' logits.
      corrupt: how many images were left out.
    """

    num_classes: int
    image: Int[np.ndarray, "images"]
    label: Int[np.ndarray, "images"]
    train_form: Int[np.ndarray, "images"]
    inference_form: Int[np.ndarray, "images"]
    top_train_form: Bool[np.ndarray, "images"]
    top_inference_form: Bool[np.ndarray, "images"]
    loss: Float[np.ndarray, "images"]
    difference: Float[np.ndarray, "images"]
    corrupt: int

    def figures(self) -> dict[str, float]:
        """accuracy_FORM and, of more than TOP classes, top5_accuracy_FORM (shares) of both forms, eval_loss (the mean),
        max_difference (the largest), eval_images and eval_corrupt (counts)."""
        found = {f"accuracy_{form}": float(np.mean(getattr(self, form) == self.label)) for form in FORMS}
        if self.num_classes > TOP:
            found |= {f"top5_accuracy_{form}": float(np.mean(getattr(self, f"top_{form}"))) for form in FORMS}
        return found | {
            "eval_loss": float(np.mean(self.loss, dtype=np.float64)),
            "max_difference": float(np.max(self.difference)),
            "eval_images": len(self.label),
            "eval_corrupt": self.corrupt,
        }

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Counts of images: row is the label, column the inference form's answer."""
        pairs = self.label.astype(np.int64) * self.num_classes + self.inference_form
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, -1)

    def images_by_class(self) -> Int[np.ndarray, "classes"]:
        """How many images each class has."""
        return np.bincount(self.label, minlength=self.num_classes)

    def accuracy_by_class(self) -> Float[np.ndarray, "classes"]:
        """The inference form's share of right answers for each class; NaN for a class without images."""
        right = np.bincount(self.label[self.inference_form == self.label], minlength=self.num_classes)
        images = self.images_by_class()
        return np.divide(right, images, out=np.full(self.num_classes, np.nan), where=images > 0)
