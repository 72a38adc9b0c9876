"""The main study's two contrasts with a larger model and a longer training: width 192, 9 layers, 60 epochs.

This is DeiT-Tiny with 9 of its 12 layers, 20 times the main study's parameters. It needs a GPU. One seed, so it is a
screening. All arms have the learning rate 0.001, which nothing was tried against.

Written down before the runs: the contrasts are castling against linear-angular attention with castling's training time
(76 epochs for 60, in the main study's ratio of 19 to 15), and against softmax. The test split is read once a run, at
its end.
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import Arm, Study


def config() -> ConfigDict:
    config = default_config()
    config.model.update(name="deit_tiny", depth=9, image_size=32, patch_size=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.update(flip=0.5, shift_pixels=4)
    config.train.update(epochs=60, batch_size=128)
    config.evaluation.every_epochs = 4
    config.checkpoint.every_steps = 1000
    return config


def arm(name: str, attention: str, epochs: int = 60) -> Arm:
    return Arm(name, {"model.attention": attention, "train.epochs": epochs}, (0,), (1e-3,))


STUDY = Study(
    config=config,
    arms=(
        arm("castling", "castling"),
        arm("linear_angular-equal-time", "linear_angular", epochs=76),
        arm("softmax", "softmax"),
    ),
    control="softmax",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
    contrasts=(("castling", "linear_angular-equal-time"), ("castling", "softmax")),
)
