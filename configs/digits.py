"""DeiT-micro on scikit-learn's handwritten digits: castling from start to end on two CPU cores.

python main.py --config=configs/digits.py
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.name = "deit_micro"
    config.model.drop_path_rate = 0.1
    config.dataset.name = "digits"
    config.augment.shift_pixels = 1  # digits of 8 x 8 pixels; a mirrored digit would be another digit
    config.train.epochs = 80
    config.train.batch_size = 64
    config.optimizer.learning_rate = 2e-3
    config.evaluation.every_epochs = 5
    return config
