"""Is masked pre-training worth it for castling, and as much as for softmax?

Written down before the runs: the contrasts are castling after masked pre-training against castling from random weights,
the same for softmax, and castling against softmax, both after pre-training. Both of a pair have the same fine-tuning. A
difference is reported with its 95 % interval, without any other test. castling's taps are 1-D in these contrasts; the
arms with 2-D taps, which keep a patch's neighbours while others are hidden, are there to choose between the two.

The model and the data are the pilot's. Pre-training sees 16 of 64 patches for 20 epochs, with a decoder of one block;
each attention is pre-trained with itself. Then the classifier learns for 5 epochs, with cifar10_rates' choice of the
learning rate. The mask starts at 0.8 / N, for N = 17 tokens in pre-training and 65 afterwards. The test split is read
once a run, at its end.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import START, Arm, Study

# name -> (attention, taps, learning rate of the classifier)
KINDS = {
    "castling": ("castling", "1d", 2e-3),
    "softmax": ("softmax", None, 4e-3),
    "castling-2d": ("castling", "2d", 2e-3),
}


def common(tokens: int) -> ConfigDict:
    config = default_config()
    config.model.update(image_size=32, patch_size=4, num_heads=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.flip = 0.5
    config.mask.start_threshold = 0.8 / tokens
    config.train.batch_size = 128
    config.checkpoint.every_steps = 100
    return config


def config() -> ConfigDict:
    config = common(tokens=65)
    config.model.name = "deit_micro"
    config.augment.shift_pixels = 4
    config.train.epochs = 5
    config.optimizer.warmup_epochs = 1.0
    return config


def pretraining(kind: str) -> ConfigDict:
    attention, taps, _ = KINDS[kind]
    config = common(tokens=17)
    config.model.update(name="mae", backbone="deit_micro", attention=attention, token_conv=taps)
    config.model.update(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
    config.augment.crop_scale = (0.2, 1.0)
    config.train.epochs = 20
    config.optimizer.update(learning_rate=2e-3, b2=0.95, warmup_epochs=2.0)
    config.evaluation.every_epochs = 5
    return config


def arm(kind: str, *, is_pretrained: bool) -> Arm:
    attention, taps, rate = KINDS[kind]
    fields: dict[str, Any] = {"model.attention": attention, "model.token_conv": taps}
    if not is_pretrained:
        return Arm(f"{kind}-fresh", fields, (0, 1, 2), (rate,))
    return Arm(f"{kind}-pretrained", {**fields, "init_from": START}, (0, 1, 2), (rate,), start=f"mae-{kind}")


STUDY = Study(
    config=config,
    arms=tuple(arm(kind, is_pretrained=is_pretrained) for kind in KINDS for is_pretrained in (True, False)),
    starts={f"mae-{kind}": functools.partial(pretraining, kind) for kind in KINDS},
    control="softmax-fresh",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
    contrasts=(
        ("castling-pretrained", "castling-fresh"),
        ("softmax-pretrained", "softmax-fresh"),
        ("castling-pretrained", "softmax-pretrained"),
    ),
)
