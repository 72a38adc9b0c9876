"""Settles masked pre-training on validation: what should castling's taps read while most patches are hidden?

The model and the data are the pilot's. A masked autoencoder sees 16 of 64 patches for 20 epochs; then the classifier
learns for 3 epochs. `1d` taps read the next visible patches, `2d` taps the patches' own neighbours on the grid, and
`none` are there in the classifier only. Each is compared with the same classifier from random weights. The decoder has
one block: the backbone has four.

The mask starts at 0.8 / N, for N = 17 tokens in pre-training and 65 afterwards. One seed; the test split is not read.
"""

import functools

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import START, Arm, Study

CLASSIFIER_TAPS = {"1d": "1d", "2d": "2d", "none": "1d"}  # pre-training's taps -> the classifier's


def common(tokens: int) -> ConfigDict:
    config = default_config()
    config.model.update(image_size=32, patch_size=4, num_heads=4)
    config.dataset.update(name="folder:data_local/cifar10", eval_split="val")
    config.augment.flip = 0.5
    config.mask.start_threshold = 0.8 / tokens
    config.train.batch_size = 128
    config.checkpoint.every_steps = 100
    return config


def config() -> ConfigDict:
    config = common(tokens=65)
    config.model.name = "deit_micro"
    config.augment.shift_pixels = 4
    config.train.epochs = 3
    config.optimizer.warmup_epochs = 1.0
    return config


def pretraining(taps: str) -> ConfigDict:
    config = common(tokens=17)
    config.model.update(name="mae", backbone="deit_micro", token_conv=taps)
    config.model.update(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
    config.augment.crop_scale = (0.2, 1.0)
    config.train.epochs = 20
    config.optimizer.update(learning_rate=2e-3, b2=0.95, warmup_epochs=2.0)
    config.evaluation.every_epochs = 5
    return config


def arm(name: str, taps: str, **changes: str) -> Arm:
    start = f"mae-{taps}" if changes else None
    fields = {"model.token_conv": CLASSIFIER_TAPS[taps], **changes}
    return Arm(name, fields, seeds=(0,), learning_rates=(2e-3,), start=start)


STUDY = Study(
    config=config,
    arms=(
        arm("fresh-1d", "1d"),
        arm("fresh-2d", "2d"),
        *(arm(f"pretrained-{taps}", taps, init_from=START) for taps in CLASSIFIER_TAPS),
    ),
    starts={f"mae-{taps}": functools.partial(pretraining, taps) for taps in CLASSIFIER_TAPS},
    control="fresh-1d",
    test_split=None,
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
)
