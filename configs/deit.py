"""DeiT on ImageNet with its recipe (Touvron et al., 2021): 300 epochs, 1,024 images a batch.

python main.py --config=configs/deit.py:small            castling; or tiny, base
python main.py --config=configs/deit.py:small,softmax    or linear_angular, angular

Published for softmax: 72.2 / 79.8 / 81.8 % (tiny / small / base). Castling's own recipe is not published, and we have
not trained this file's models to the end, so it promises no accuracy. A run takes 375,300 steps; docs/performance.md
has the compiler's estimates for one step.
"""

from ml_collections import ConfigDict

from ._imagenet import imagenet_config

VARIANTS = {"tiny": "deit_tiny", "small": "deit_small", "base": "deit_base"}


def get_config(argument: str = "") -> ConfigDict:
    config = imagenet_config("DeiT", argument, VARIANTS, default="small")
    config.model.drop_path_rate = 0.1
    config.augment.update(repeats=3, mix_rows=256)  # the recipe draws its mixing once on each GPU, for 256 images
    config.train.update(epochs=300, batch_size=1024, export="raw")
    config.optimizer.update(
        learning_rate=5e-4,
        reference_batch=512,
        scaled_rates="peak",
        initial_learning_rate=1e-6,
        final_learning_rate=1e-5,
        warmup_epochs=5.0,
        weight_decay=0.05,
        b1=0.9,
        b2=0.999,
    )
    return config
