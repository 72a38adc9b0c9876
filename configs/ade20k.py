"""A segmenter on ADE20K, from MAE's weights, with the recipe of MMSegmentation's UperNet on MAE's ViT-B.

python main.py --config=configs/ade20k.py:base --config.init_from=RUN           RUN of configs/mae.py; or small
python main.py --config=configs/ade20k.py:base,softmax --config.init_from=mae_pretrain_vit_base.pth

Both need --config.dataset.name=masks:PATH/ADE20K; docs/howto/segmentation.md says how to arrange the published files.
Published for UperNet on MAE's ViT-B, pre-trained for 1,600 epochs: 48.1 % mIoU. This recipe differs: SegFormer's
simpler head on the last map, without an auxiliary head; a cosine in place of a linear rate; and batches of 64 images
in place of 16, one for each chip of a v5e:8x8, with the rate scaled in proportion. Nobody has tried that, and we have
not trained this file's models. Castling-ViT's authors report segmenters "on top of Mask2Former", without a recipe. A
run takes 40,005 steps.
"""

from ml_collections import ConfigDict

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.training.config import default_config

VARIANTS = {"small": "deit_small", "base": "deit_base"}
SIDE = 512
EPOCHS = 127  # 160,000 steps of 16 images


def get_config(argument: str = "base") -> ConfigDict:
    variant, attention, *more = f"{argument},,".split(",")
    if any(more):
        raise InputError(f"the configuration 'ade20k' takes VARIANT[,ATTENTION], not {argument!r}.")
    variant, attention = variant or "base", attention or "castling"
    check_known("variant of ADE20K's segmenter", variant, VARIANTS)
    check_known("attention", attention, KINDS)
    config = default_config()
    config.model.update(name="pyramid_segmenter", backbone=VARIANTS[variant], attention=attention, image_size=SIDE)
    config.model.update(dtype="bfloat16", drop_path_rate=0.1)
    # The masks have the classes' numbers from 1; 0 is everything else.
    config.dataset.update(name="masks:PATH/ADE20K", train_split="train", eval_split="val", first_label=1, workers=8)
    config.dataset.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="slide", crop_ratio=1.0)
    config.augment.update(scale_range=(0.5, 2.0), flip=0.5, distort=0.5)
    # A uniform row of softmax weights has 1 / tokens everywhere: a threshold above that would mask nearly all of it.
    config.mask.start_threshold = 0.8 / ((SIDE // 16) ** 2 + 1)
    config.train.update(epochs=EPOCHS, batch_size=64)
    config.optimizer.update(
        learning_rate=1e-4,
        reference_batch=16,
        initial_learning_rate=0.0,
        final_learning_rate=0.0,
        warmup_epochs=1500 * 16 / 20_210,  # 1,500 steps of 16 images
        weight_decay=0.05,
        layer_decay=0.65,
    )
    config.evaluation.update(every_epochs=10, batch_size=64)
    config.checkpoint.every_steps = 1000
    config.logging.every_steps = 50
    return config
