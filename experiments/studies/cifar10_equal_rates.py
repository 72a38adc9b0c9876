"""The main study's primary contrast again, with the same learning rate in all arms.

cifar10_main compared castling at 0.002 with linear-angular attention at 0.004. cifar10_rates_long then found, with one
seed on validation images, that after fifteen epochs 0.004 is better for both by about two points, and that at equal
rates and equal epochs the two are level.

Written down before the runs: the contrasts are castling against linear-angular attention with castling's training time
(19 epochs for 15, as in cifar10_main), and against it with the same epochs, each a paired difference with its 95 %
interval and nothing else. The test split is read once a run, at its end.
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import Arm, Study


def config() -> ConfigDict:
    config = default_config()
    config.model.update(name="deit_micro", image_size=32, patch_size=4, num_heads=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.update(flip=0.5, shift_pixels=4)
    config.train.update(epochs=15, batch_size=128)
    config.checkpoint.every_steps = 100
    return config


def arm(name: str, attention: str, epochs: int = 15) -> Arm:
    return Arm(name, {"model.attention": attention, "train.epochs": epochs}, (0, 1, 2), (4e-3,))


STUDY = Study(
    config=config,
    arms=(
        arm("castling", "castling"),
        arm("linear_angular-equal-time", "linear_angular", epochs=19),
        arm("linear_angular", "linear_angular"),
    ),
    control="linear_angular-equal-time",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
    contrasts=(("castling", "linear_angular-equal-time"), ("castling", "linear_angular")),
)
