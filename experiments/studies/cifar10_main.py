"""The main study: is castling worth its training time, and how close does it come to softmax?

Written down before the runs:

1. The primary contrast is castling against linear-angular attention with the same taps and castling's training time.
   Until the mask is empty, a step with castling takes 1.36 times as long as one with linear-angular attention (CPU time
   of 25 alternating steps: 391 and 287 ms at the least, 432 and 315 ms in the median); afterwards both take the same.
   Over a training with the branch in 80 % of its steps this makes 1.29 times, so the control has 19 epochs in place
   of 15.
2. The second contrast is castling against softmax. The margin is 0.5 points: castling is as good as softmax if all of
   the interval is above -0.5.
3. Then a trained softmax model becomes castling, or linear-angular attention directly, in 4 epochs and in 1 (27 % and
   7 % of softmax's own), distilled from the model that it started from.

A contrast is reported as a paired difference with its 95 % interval, without any other test. Arms with one seed are a
screening. The model and the data are the pilot's. Learning rates are cifar10_rates' choice on validation, also for
variants of its arms; the other attentions have 0.002, and arms that start from a trained model 0.001. The mask has the
authors' settings. The test split is read once a run, at its end.
"""

from typing import Any

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import START, Arm, Study

ONE, THREE, SIX = (0,), (0, 1, 2), (0, 1, 2, 3, 4, 5)  # seeds
DISTILLED = {"distillation.teacher": START, "distillation.kind": "soft"}


def config() -> ConfigDict:
    config = default_config()
    config.model.update(name="deit_micro", image_size=32, patch_size=4, num_heads=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.update(flip=0.5, shift_pixels=4)
    config.train.update(epochs=15, batch_size=128)
    config.checkpoint.every_steps = 100
    return config


def arm(name: str, attention: str, rate: float, seeds: tuple[int, ...], **changes: Any) -> Arm:
    fields = {"model.attention": attention} | {field.replace("__", "."): value for field, value in changes.items()}
    return Arm(name, fields, seeds, (rate,))


def from_softmax(attention: str, epochs: int) -> Arm:
    fields = {"model.attention": attention, "train.epochs": epochs, "init_from": START, **DISTILLED}
    return Arm(f"{attention}-from-softmax-{epochs}", fields, THREE, (1e-3,), start="softmax")


STUDY = Study(
    config=config,
    arms=(
        arm("castling", "castling", 2e-3, SIX),
        arm("linear_angular-equal-time", "linear_angular", 4e-3, SIX, train__epochs=19),
        arm("softmax", "softmax", 4e-3, THREE),
        arm("softmax_taps", "softmax_taps", 2e-3, THREE),
        arm("linear_angular", "linear_angular", 4e-3, THREE),
        arm("relu_linear_taps", "relu_linear_taps", 4e-3, THREE),
        from_softmax("castling", 4),
        from_softmax("linear_angular", 4),
        from_softmax("castling", 1),
        from_softmax("linear_angular", 1),
        arm("linear_angular-no-taps", "linear_angular", 4e-3, ONE, model__token_conv="none"),
        arm("angular", "angular", 2e-3, ONE),
        arm("castling-2d", "castling", 2e-3, ONE, model__token_conv="2d"),
        arm("castling-cut", "castling", 2e-3, ONE, mask__schedule="constant"),
        Arm("linear_angular-distilled", {"model.attention": "linear_angular", **DISTILLED}, ONE, (4e-3,), "softmax"),
        arm("taylor", "taylor", 2e-3, ONE),
        arm("focused_linear", "focused_linear", 2e-3, ONE),
        arm("separable", "separable", 2e-3, ONE),
        arm("window", "window", 2e-3, ONE, model__window_size=4),
    ),
    control="softmax",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
    contrasts=(
        ("castling", "linear_angular-equal-time"),
        ("castling", "softmax"),
        ("castling-from-softmax-4", "linear_angular-from-softmax-4"),
        ("castling-from-softmax-1", "linear_angular-from-softmax-1"),
    ),
)
