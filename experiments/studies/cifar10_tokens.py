"""Where tokens are many: 256 in place of the main study's 64.

Four epochs with patches of 2 pixels, beside four epochs with the main study's patches of 4. A training with 256 tokens
takes four to five times as long; the contrasts are those with 256 tokens, written down before the runs. The model, the
data and the learning rates are the main study's. The mask has the authors' settings, whose threshold of 0.02 is above
the mean weight of 257 tokens, 0.004: it starts with few weights. The test split is read once a run, at its end.
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import Arm, Study

RATES = {"softmax": 4e-3, "linear_angular": 4e-3, "castling": 2e-3}
TOKENS = {64: 4, 256: 2}  # tokens -> patch size


def config() -> ConfigDict:
    config = default_config()
    config.model.update(name="deit_micro", image_size=32, num_heads=4)
    config.dataset.update(name="npz:data_local/cifar10.npz", eval_split="val")
    config.augment.update(flip=0.5, shift_pixels=4)
    config.train.update(epochs=4, batch_size=128)
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    return config


def arm(attention: str, tokens: int) -> Arm:
    fields = {"model.attention": attention, "model.patch_size": TOKENS[tokens]}
    return Arm(f"{attention}-{tokens}", fields, (0, 1, 2), (RATES[attention],))


STUDY = Study(
    config=config,
    arms=tuple(arm(attention, tokens) for tokens in TOKENS for attention in RATES),
    control="softmax-256",
    test_split="test",
    about_data=(
        "CIFAR-10 as lightly JPEG-compressed files, a tenth of its training set held out for validation: these figures "
        "are not to be compared with published CIFAR-10 figures."
    ),
    contrasts=(("castling-256", "linear_angular-256"), ("castling-256", "softmax-256")),
)
