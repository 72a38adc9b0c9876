"""The pilot: can a model that two CPU cores train in minutes tell attentions apart?

DeiT of width 64 with 4 layers, on the 8 x 8 patches of 32 x 32 pixels, for 5 epochs; one seed, so a screening only.

There are 4 heads of 16 channels. Linear attention is a kernel of a rank no higher than about a head's channels, so it
has to lose to softmax, if anywhere, where tokens outnumber them: 65 tokens are 4.1 times 16, as DeiT's 197 are 3.1
times its 64. With 32 channels, 2.0 times, the setting would favour the linear attentions.

What an attention is worth is its distance from two controls. `no_attention` returns zeros and leaves the taps and the
MLP; but then the class token sees the few patches that the taps reach, so it would make any attention look good.
`uniform` gives every token the mean of the values: the class token sees all patches, and no weight depends on content.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import castling_jax
from castling_jax.training.config import default_config
from experiments.study import Arm, Study


def no_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.zeros_like(v)


def uniform(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)


for control in (no_attention, uniform):
    castling_jax.register_attention(control.__name__, control)  # with the taps


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
    config.train.epochs = 5
    config.train.batch_size = 128
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    return config


ATTENTIONS = ("softmax", "no_attention", "uniform", "linear_angular", "castling")

STUDY = Study(
    config=config,
    arms=tuple(Arm(name, {"model.attention": name}, seeds=(0,), learning_rates=(2e-3,)) for name in ATTENTIONS),
    control="softmax",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
)
