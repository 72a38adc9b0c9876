"""LeViT on ImageNet with its recipe (Graham et al., 2021): 1,000 epochs, 2,048 images a batch.

python main.py --config=configs/levit.py:256             castling; or 128s, 128, 192, 384
python main.py --config=configs/levit.py:256,softmax     or linear_angular, angular

The recipe keeps an average of the weights but publishes the raw ones: here both are evaluated, and the raw ones
exported. Published for softmax: 76.6 / 78.6 / 80.0 / 81.6 / 82.6 %, with RegNetY-160 as a teacher. This project does
not have that model, so both heads learn from the labels alone, unless you give a teacher:
--config.distillation.kind=hard --config.distillation.teacher=PATH --config.distillation.name=deit_base.
We have not trained this file's models to the end. A run takes 625,000 steps.
"""

from ml_collections import ConfigDict

from ._imagenet import imagenet_config

VARIANTS = {name: f"levit_{name}" for name in ("128s", "128", "192", "256", "384")}


def get_config(argument: str = "") -> ConfigDict:
    config = imagenet_config("LeViT", argument, VARIANTS, default="256")
    config.model.distilled = True
    config.augment.update(repeats=3, mix_rows=256)  # the recipe draws its mixing once on each GPU, for 256 images
    config.train.update(epochs=1000, batch_size=2048, ema_decay=0.99996, export="raw")
    config.optimizer.update(
        learning_rate=5e-4,
        reference_batch=512,
        scaled_rates="peak",
        initial_learning_rate=1e-6,
        final_learning_rate=1e-5,
        warmup_epochs=5.0,
        weight_decay=0.025,
        adaptive_clip=0.01,
    )
    return config
