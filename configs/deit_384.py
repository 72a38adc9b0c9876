"""Fine-tunes a DeiT from 224 to 384 pixels (Touvron et al., 2021, section 6): 30 epochs, 512 images a batch.

python main.py --config=configs/deit_384.py:base --config.init_from=PATH

PATH is a run's folder or timm's weights (.safetensors, .pth); the position embedding is resized. A castled model stays
castled: the mask is empty from the first step on, unless you set --config.mask.start_threshold.
"""

from ml_collections import ConfigDict

from .deit import get_config as deit_config


def get_config(argument: str = "base") -> ConfigDict:
    config = deit_config(argument)
    config.model.update(image_size=384, drop_path_rate=0.0)  # DeiT fine-tunes without drop-path
    config.train.update(epochs=30, batch_size=512)
    config.optimizer.update(
        learning_rate=5e-6, initial_learning_rate=1e-6, final_learning_rate=5e-6, weight_decay=1e-8, warmup_epochs=5.0
    )
    config.mask.update(schedule="constant", start_threshold=1.0)
    return config
