"""Masked pre-training on ImageNet with MAE's recipe (He et al., CVPR 2022, table 8): 800 epochs, 4,096 images a batch.

python main.py --config=configs/mae.py:base            DeiT-B as the encoder, castling; or small
python main.py --config=configs/mae.py:base,softmax    or linear_angular

configs/mae_finetune.py turns the result into a classifier. Castling-ViT's authors pre-trained a ViT with MAE for
segmentation, and published neither weights nor details; the mask's schedule here is ours. We have not trained this
file's models. A run takes 249,600 steps.
"""

from ml_collections import ConfigDict

from ._imagenet import imagenet_config

VARIANTS = {"small": "deit_small", "base": "deit_base"}
VISIBLE = 49 + 1  # of 196 patches a quarter, and the class token


def get_config(argument: str = "") -> ConfigDict:
    config = imagenet_config("MAE", argument, VARIANTS, default="base")
    config.model.update(name="mae", backbone=config.model.name)
    config.augment.update(crop_scale=(0.2, 1.0), flip=0.5, randaugment=None, erasing=0.0, mixup=0.0, cutmix=0.0)
    # Uniform weights over 50 tokens lie on the official threshold, 0.02: most weights would start near it.
    config.mask.start_threshold = 0.8 / VISIBLE
    config.train.update(epochs=800, batch_size=4096)
    config.optimizer.update(
        learning_rate=1.5e-4,
        reference_batch=256,
        scaled_rates="all",
        initial_learning_rate=0.0,
        final_learning_rate=0.0,
        warmup_epochs=40.0,
        weight_decay=0.05,
        b2=0.95,
    )
    config.evaluation.every_epochs = 10
    return config
