"""Castles a pretrained softmax DeiT: the run starts from its weights, and also learns from a frozen copy of it.

python main.py --config=configs/castle_pretrained.py:base --config.init_from=PATH --config.distillation.teacher=PATH

PATH is timm's softmax weights for the same model (.safetensors, .pth), or a run's folder. The schedule is ours: 100
epochs, a tenth of DeiT's rate, and a mask that empties during the middle epochs. We have not trained it to the end.
"""

from ml_collections import ConfigDict

from .deit import get_config as deit_config


def get_config(argument: str = "base") -> ConfigDict:
    config = deit_config(argument)
    config.train.epochs = 100
    config.optimizer.learning_rate = 5e-5
    config.distillation.update(kind="soft", alpha=0.5, temperature=1.0)
    return config
