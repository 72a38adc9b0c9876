"""Settles the main study on validation: each arm's learning rate, and how castling's branch empties.

The model and the data are the pilot's, which showed that the setting tells attentions apart. The budget is a fifth of
the main study's, 3 epochs, with one seed. Every figure is of the validation split; the test split is not read.

`uniform`, the pilot's control with the taps, shows what weights that depend on content are worth beside `softmax_taps`.

castling's mask starts at c / N for N = 65 tokens: weights of c times the uniform one and less are masked out. 0.02 is
the authors' value, which is c = 1.3 here. `fade` has a factor from 1 to 0 in the place of the mask.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import castling_jax
from castling_jax.training.config import default_config
from experiments.study import Arm, Study


def uniform(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)


castling_jax.register_attention("uniform", uniform)  # with the taps
TOKENS = 65
RATES = (1e-3, 2e-3, 4e-3)


def config() -> ConfigDict:
    config = default_config()
    config.model.name = "deit_micro"  # width 64, 4 layers, wider initial weights than DeiT's, for so narrow a model
    config.model.image_size = 32
    config.model.patch_size = 4
    config.model.num_heads = 4
    config.dataset.name = "folder:data_local/cifar10"
    config.dataset.eval_split = "val"
    config.augment.flip = 0.5
    config.augment.shift_pixels = 4
    config.train.epochs = 3
    config.train.batch_size = 128
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    return config


def arm(name: str, rates: tuple[float, ...] = RATES, **mask: float | str) -> Arm:
    attention = name.partition("-")[0]
    changes = {"model.attention": attention} | {f"mask.{field}": value for field, value in mask.items()}
    return Arm(name, changes, seeds=(0,), learning_rates=rates)


STUDY = Study(
    config=config,
    arms=(
        *map(arm, ("softmax", "castling", "linear_angular", "softmax_taps", "relu_linear_taps")),
        arm("uniform", (2e-3,)),
        arm("castling-half", (2e-3,), start_threshold=0.5 / TOKENS),
        arm("castling-one", (2e-3,), start_threshold=1 / TOKENS),
        arm("castling-two", (2e-3,), start_threshold=2 / TOKENS),
        arm("castling-fade", (2e-3,), kind="fade"),
        arm("castling-linear", (2e-3,), schedule="linear"),
        arm("castling-early", (2e-3,), begin=0.0, end=0.5),
    ),
    control="softmax",
    test_split=None,
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files: these figures are not to be compared with published CIFAR-10 "
        "figures. All are of the 5,000 validation images, a tenth of the training set; the test set is not read."
    ),
)
