"""The main study's second contrast again, with the learning rates that fifteen epochs on validation images choose.

cifar10_main compared castling at 0.002 with softmax at 0.004. cifar10_rates_long then found, with one seed on
validation images, that after fifteen epochs 0.004 is better for castling, 0.002 for softmax, and 0.004 for softmax
with taps, by less.

Written down before the runs: castling's runs at 0.004 are cifar10_equal_rates'. The contrast is castling there
against softmax here, seed by seed, with cifar10_main's margin: castling is as good as softmax if all of the 95 %
interval is above -0.5 points. The second one is castling there against softmax with taps here, which has castling's
rate. The test split is read once a run, at its end.
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


def arm(attention: str, rate: float) -> Arm:
    return Arm(attention, {"model.attention": attention}, (0, 1, 2), (rate,))


STUDY = Study(
    config=config,
    arms=(arm("softmax", 2e-3), arm("softmax_taps", 4e-3)),
    control="softmax",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
)
