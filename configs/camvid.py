"""A segmenter with a castling LeViT on CamVid's street scenes (Brostow et al., 2008), on two CPU cores.

python main.py --config=configs/camvid.py --config.dataset.name=masks:PATH/CamVid
python main.py --config=configs/camvid.py:softmax --config.dataset.name=masks:PATH/CamVid

The data set has 701 photographs of 480 x 360 pixels, of which SegNet's authors have 367 / 101 / 233 in train, val and
test, and 11 classes; docs/howto/segmentation.md says how to arrange them. The segmenter learns from scratch on train.
The run evaluates it on val on the way, and once on test, at the end.
"""

from ml_collections import ConfigDict

from castling_jax.errors import check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.training.config import default_config


def get_config(attention: str = "castling") -> ConfigDict:
    check_known("attention", attention, KINDS)
    config = default_config()
    config.model.update(
        name="pyramid_segmenter",
        backbone="levit_128s",
        attention=attention,
        # A third of levit_128s's width: there are 367 images to learn from.
        embed_dim=(64, 96, 128),
        depth=(2, 2, 2),
        num_heads=(2, 3, 4),
        head_channels=64,
        image_size=(240, 320),  # two thirds of the photographs' sides
    )
    config.dataset.update(name="masks:PATH/CamVid", train_split="train", eval_split="val", test_split="test")
    config.dataset.update(ignore_label=11)  # void
    config.dataset.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="squash", crop_ratio=1.0)
    config.augment.update(scale_range=(0.75, 2.0), flip=0.5, distort=0.5)
    # The largest grid has 320 tokens; below 1/320 a uniform row of softmax weights is kept whole.
    config.mask.start_threshold = 0.0025
    config.train.update(epochs=80, batch_size=8, ema_decay=0.998)
    config.optimizer.update(learning_rate=2e-3, weight_decay=0.05, warmup_epochs=5.0)
    config.evaluation.update(every_epochs=10, batch_size=8)
    return config
