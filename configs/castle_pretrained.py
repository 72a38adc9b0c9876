"""Castles a pretrained softmax DeiT: it starts from its weights and learns from a frozen copy of it besides.

python main.py --config=configs/castle_pretrained.py:base --config.init_from=PATH --config.distillation.teacher=PATH

PATH is timm's softmax weights of the same model (.safetensors, .pth), or the folder of a run. The schedule is ours: 100
epochs, a tenth of DeiT's rate, and the mask emptied over the middle of them. It has not been trained to its end here.
"""

from ml_collections import ConfigDict

from .deit import get_config as deit_config


def get_config(argument: str = "base") -> ConfigDict:
    config = deit_config(argument)
    config.train.epochs = 100
    config.optimizer.learning_rate = 5e-5
    config.distillation.update(kind="soft", alpha=0.5, temperature=1.0)
    return config
