"""DeiT-micro on Fashion-MNIST: 60,000 real grey images of 28 x 28 pixels, cut into 16 patches.

python -m castling_jax prepare fashion_mnist
python main.py --config=configs/fashion_mnist.py

Five epochs, 9 minutes of CPU time: about 5 minutes on two cores. About 85 % of the 10,000 test images.
"""

from ml_collections import ConfigDict

from castling_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.name = "deit_micro"
    config.model.image_size = 28
    config.model.patch_size = 7
    config.model.drop_path_rate = 0.1
    config.dataset.name = "fashion_mnist"
    config.augment.update(flip=0.5, shift_pixels=2, mixup=0.2)
    config.train.ema_decay = 0.998
    config.train.epochs = 5
    config.train.batch_size = 128
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 0.5
    return config
