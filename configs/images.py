"""Masked pre-training on your own images, without labels.

python main.py --config=configs/images.py:SIZE --config.dataset.name=images:PATH
python main.py --config=configs/images.py:224,deit_small,softmax --config.dataset.name=images:PATH

The images are in and below PATH/train/ and PATH/val/, or in and below PATH; then a tenth of them is held out. The model
sees SIZE x SIZE pixels. Without a BACKBONE, it is deit_tiny from 96 pixels up, and below that deit_micro with about
8 x 8 patches. What follows pre-training starts from it by --config.init_from: configs/masks.py takes the same SIZE and
BACKBONE.
"""

from ml_collections import ConfigDict

from ._own_images import own_images, patches


def get_config(argument: str = "") -> ConfigDict:
    config = own_images("images", argument)
    tokens = 1 + max(1, patches(config) // 4)  # the class token, and the quarter of the patches that is not hidden
    config.model.update(name="mae", backbone=config.model.name, drop_path_rate=0.0)
    config.dataset.name = "images:PATH"
    config.augment.update(crop_scale=(0.2, 1.0), flip=0.5)
    # Uniform weights are 1 / tokens; above that the threshold would mask nearly all of them from the start.
    config.mask.start_threshold = min(0.02, 0.8 / tokens)
    config.train.epochs = 100
    config.optimizer.update(learning_rate=1e-3, b2=0.95, weight_decay=0.05)
    config.evaluation.every_epochs = 10
    return config
