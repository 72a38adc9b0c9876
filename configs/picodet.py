"""PicoDet with a castling backbone on COCO, with the recipe of PaddleDetection's PicoDet v2 at 416 pixels.

python main.py --config=configs/picodet.py:s                      LeViT-128s as the backbone, castling; or m, l
python main.py --config=configs/picodet.py:m,levit_256            or another backbone
python main.py --config=configs/picodet.py:s,levit_128s,softmax   or another attention

--config.init_from=RUN starts the backbone from a classification run's weights, or from timm's. Castling-ViT's authors
report detectors "on top of PicoDet" and state neither the version, nor the epochs, nor the image size. In our reading,
only the backbone's attention is castled; neck and head are PicoDet's. PicoDet's own recipe is SGD, and nobody has shown
that it suits these backbones. PaddleDetection publishes 32.5 / 37.5 / 39.4 % mAP for PicoDet S, M and L with its own
convolutional backbone: more than Castling-ViT's detectors have at equal MACs. We have not trained this file's models. A
run takes 184,800 steps (l: 369,600).
"""

from ml_collections import ConfigDict

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.registry import MODELS
from castling_jax.training.config import default_config

SIZES = ("s", "m", "l")
BATCHES = {"s": 192, "m": 192, "l": 96}  # over 4 GPUs
RATES = {"s": 0.24, "m": 0.24, "l": 0.12}
IMAGES = 118_287
LARGEST_GRID = 26 * 26  # tokens of a 416 x 416 image at a stride of 16 pixels


def get_config(argument: str = "s") -> ConfigDict:
    size, backbone, attention, *more = f"{argument},,".split(",")
    if any(more):
        raise InputError(f"the configuration 'picodet' takes SIZE[,BACKBONE[,ATTENTION]], not {argument!r}.")
    size, backbone, attention = size or "s", backbone or "levit_128s", attention or "castling"
    check_known("size of PicoDet", size, SIZES)
    check_known("backbone", backbone, MODELS)
    check_known("attention", attention, KINDS)
    config = default_config()
    config.model.update(name=f"picodet_{size}", backbone=backbone, attention=attention, image_size=416)
    config.model.dtype = "bfloat16"
    config.dataset.update(name="coco/2017", train_split="train", eval_split="validation", workers=8)
    config.dataset.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="squash", crop_ratio=1.0)
    config.augment.update(flip=0.5, box_crop=True, distort=0.5, image_sizes=(352, 384, 416, 448, 480))
    config.mask.start_threshold = 0.8 / LARGEST_GRID  # 0.02 would mask nearly all weights from the first step on
    config.loss.atss_epochs = 100.0
    config.train.update(epochs=300, batch_size=BATCHES[size], ema_decay=0.9998)
    config.optimizer.update(
        name="sgd",
        learning_rate=RATES[size],
        reference_batch=BATCHES[size],
        scaled_rates="all",
        initial_learning_rate=0.1 * RATES[size],
        final_learning_rate=0.0,
        warmup_epochs=300 * BATCHES[size] / IMAGES,  # 300 steps
        weight_decay=4e-5,
    )
    config.evaluation.update(every_epochs=10, batch_size=256)
    config.checkpoint.every_steps = 1000
    config.logging.every_steps = 50
    return config
