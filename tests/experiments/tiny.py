"""A study that is over in a minute: two attentions and two seeds on the digits."""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config
from experiments.study import Arm, Study


def config() -> ConfigDict:
    config = default_config()
    config.model.name = "deit_micro"
    config.model.depth = 1
    config.dataset.train_split = "minitrain"
    config.dataset.eval_split = "minival"
    config.train.epochs = 1
    config.train.batch_size = 16
    config.optimizer.warmup_epochs = 0.2
    config.checkpoint.every_steps = 5
    return config


STUDY = Study(
    config=config,
    arms=tuple(
        Arm(name, {"model.attention": name}, seeds=(0, 1), learning_rates=(2e-3,)) for name in ("castling", "softmax")
    ),
    control="softmax",
    test_split="test",
    about_data="Digits.",
)
