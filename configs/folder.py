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

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.registry import list_models
from castling_jax.training.config import default_config

FEWEST_PIXELS = 96  # for deit_tiny: its patches have 16 x 16 pixels, so smaller images would have fewer than 36


def get_config(argument: str = "") -> ConfigDict:
    size, model, attention, *more = f"{argument},,".split(",")
    if not size.isdecimal() or not int(size) or any(more):
        raise InputError(
            f"the configuration 'folder' takes SIZE[,MODEL[,ATTENTION]], as in folder:224, not {argument!r}."
        )
    pixels = int(size)
    config = default_config()
    config.model.update(
        name=model or ("deit_tiny" if pixels >= FEWEST_PIXELS else "deit_micro"),
        attention=attention or "castling",
        image_size=pixels,
        drop_path_rate=0.1,
    )
    check_known("model", config.model.name, list_models())
    check_known("attention", config.model.attention, KINDS)
    # The largest patch that divides the image and leaves at least 7 patches along a side.
    if not model and pixels < FEWEST_PIXELS:
        config.model.patch_size = max(side for side in range(1, max(pixels // 7, 1) + 1) if pixels % side == 0)
    # ImageNet's mean and std, with which timm's weights were trained.
    config.dataset.update(name="folder:PATH", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.augment.update(crop_scale=(0.35, 1.0), flip=0.5, color_jitter=0.2)
    config.reset_head = True  # weights that init_from names have other classes
    config.train.epochs = 30
    config.optimizer.learning_rate = 5e-4
    return config
