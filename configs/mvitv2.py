"""MViTv2 on ImageNet with its recipe (Li et al., 2022): 300 epochs, 2,048 images a batch.

python main.py --config=configs/mvitv2.py:tiny            castling; or small, base
python main.py --config=configs/mvitv2.py:tiny,softmax    or linear_angular, angular

Published for softmax: 82.3 / 83.6 / 84.4 % (tiny / small / base); for castling, base: 85.0 % with an unpublished
recipe. We have not trained this file's models to the end. A run takes 187,500 steps.
"""

from ml_collections import ConfigDict

from ._imagenet import imagenet_config

VARIANTS = {"tiny": "mvitv2_tiny", "small": "mvitv2_small", "base": "mvitv2_base"}


def get_config(argument: str = "") -> ConfigDict:
    config = imagenet_config("MViTv2", argument, VARIANTS, default="tiny")
    # The recipe draws its mixing once on each GPU, for 32 images.
    config.augment.update(randaugment="rand-m9-n6-mstd0.5-inc1", mix_rows=32)
    config.train.update(epochs=300, batch_size=2048)
    config.optimizer.update(
        learning_rate=2.5e-4,
        reference_batch=256,
        scaled_rates="all",
        initial_learning_rate=1e-8,
        final_learning_rate=1e-6,
        warmup_epochs=70.0,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    return config
