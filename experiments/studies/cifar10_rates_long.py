"""Were cifar10_rates' learning rates right? It chose them after 3 epochs, and the main study's runs have 15.

The main study's setting with both of the rates that were chosen there, 0.002 and 0.004, for four of its arms. Written
down after the main study, where castling with 0.002 came out below linear-angular attention with 0.004. One seed, on
validation; the test split is not read.
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import Arm, Study

ATTENTIONS = ("castling", "linear_angular", "softmax", "softmax_taps")


def config() -> ConfigDict:
    config = default_config()
    config.model.update(name="deit_micro", image_size=32, patch_size=4, num_heads=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.update(flip=0.5, shift_pixels=4)
    config.train.update(epochs=15, batch_size=128)
    config.checkpoint.every_steps = 100
    return config


STUDY = Study(
    config=config,
    arms=tuple(Arm(attention, {"model.attention": attention}, (0,), (2e-3, 4e-3)) for attention in ATTENTIONS),
    control="softmax",
    test_split=None,
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
)
