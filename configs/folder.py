"""A model for your own images, with a folder for each class.

python main.py --config=configs/folder.py:SIZE --config.dataset.name=folder:PATH
python main.py --config=configs/folder.py:224,deit_tiny,softmax --config.dataset.name=folder:PATH

The images are in PATH/train/CLASS/ and PATH/val/CLASS/, or in PATH/CLASS/; then a tenth of them is held out. The model
sees SIZE x SIZE pixels. Without a MODEL, it is deit_tiny from 96 pixels up, and below that deit_micro with about 8 x 8
patches. To start from timm's weights, add --config.init_from=FILE and divide the learning rate by ten,
--config.optimizer.learning_rate=5e-5.

deit_tiny at 224 pixels trains about 20 images a second on two CPU cores: an epoch of 1,000 images takes about a minute.
"""

from ml_collections import ConfigDict

from ._own_images import own_images


def get_config(argument: str = "") -> ConfigDict:
    config = own_images("folder", argument)
    config.dataset.name = "folder:PATH"
    config.augment.update(crop_scale=(0.35, 1.0), flip=0.5, color_jitter=0.2)
    config.reset_head = True  # weights that init_from names have other classes
    config.train.epochs = 30
    config.optimizer.learning_rate = 5e-4
    return config
