"""PicoDet with a castling LeViT on photographs of blood cells (github.com/Shenggan/BCCD_Dataset), on two CPU cores.

python main.py --config=configs/cells.py --config.dataset.name=voc:PATH/BCCD
python main.py --config=configs/cells.py:softmax --config.dataset.name=voc:PATH/BCCD

The data set has 364 photographs of 640 x 480 pixels with some 4,900 boxes of three classes. The detector learns from
scratch on the split train. The run evaluates it on val on the way, and once on test, at the end. The number of
epochs was chosen on val.
"""

from ml_collections import ConfigDict

from castling_jax.errors import check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.training.config import default_config


def get_config(attention: str = "castling") -> ConfigDict:
    check_known("attention", attention, KINDS)
    config = default_config()
    config.model.update(
        name="picodet_s",
        backbone="levit_128s",
        attention=attention,
        # A third of levit_128s's width: there are 205 images to learn from.
        embed_dim=(64, 96, 128),
        depth=(2, 2, 2),
        num_heads=(2, 3, 4),
        image_size=(256, 320),  # nearly the photographs' aspect ratio, in multiples of 32
        neck_channels=64,
        num_convs=1,
    )
    config.dataset.update(name="voc:PATH/BCCD", train_split="train", eval_split="val", test_split="test")
    config.dataset.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="squash", crop_ratio=1.0)
    config.augment.update(flip=0.5, box_crop=True, distort=0.5)
    # The largest grid has 320 tokens; below 1/320 a uniform row of softmax weights is kept whole.
    config.mask.start_threshold = 0.0025
    config.loss.atss_epochs = 30.0
    config.train.update(epochs=80, batch_size=8, ema_decay=0.998)
    config.optimizer.update(learning_rate=2e-3, weight_decay=0.05, warmup_epochs=3.0)
    config.evaluation.update(every_epochs=10, batch_size=8)
    return config
