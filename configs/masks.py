"""A segmenter for your own images with masks.

python main.py --config=configs/masks.py:SIZE --config.dataset.name=masks:ROOT
python main.py --config=configs/masks.py:224,deit_small,softmax --config.dataset.name=masks:ROOT --config.init_from=RUN

The images are in ROOT/train/ and ROOT/val/, or ROOT/train/ alone; then a tenth of them is held out. The masks are in
ROOT/train_labels/ and ROOT/val_labels/: docs/howto/segmentation.md says how to write them. The model sees SIZE x SIZE
pixels. Without a BACKBONE, it is deit_tiny from 96 pixels up, and below that deit_micro with about 8 x 8 patches. RUN
is of configs/images.py, with the same SIZE and BACKBONE; or a classifier's, or timm's weights. With RUN, divide the
learning rate by ten, --config.optimizer.learning_rate=1e-4.
"""

from ml_collections import ConfigDict

from ._own_images import own_images, patches


def get_config(argument: str = "") -> ConfigDict:
    config = own_images("masks", argument)
    config.model.update(name="pyramid_segmenter", backbone=config.model.name)
    config.dataset.update(name="masks:ROOT", crop_mode="squash", crop_ratio=1.0)
    config.augment.update(scale_range=(0.5, 2.0), flip=0.5, distort=0.5)
    # Uniform weights are 1 / tokens; above that the threshold would mask nearly all of them from the start.
    config.mask.start_threshold = min(0.02, 0.8 / (1 + patches(config)))
    config.train.epochs = 60
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.05)
    config.evaluation.every_epochs = 5
    return config
