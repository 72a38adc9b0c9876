"""Fine-tunes a masked autoencoder's encoder on ImageNet, with MAE's recipe (He et al., CVPR 2022, table 9).

python main.py --config=configs/mae_finetune.py:base --config.init_from=RUN    RUN of configs/mae.py, or MAE's weights
python main.py --config=configs/mae_finetune.py:base,softmax --config.init_from=mae_pretrain_vit_base.pth

Published for ViT-B, pre-trained for 1,600 epochs and with softmax attention: 83.6 %. Without init_from the same recipe
starts from scratch. We have not trained this file's models. A run takes 125,100 steps.
"""

from ml_collections import ConfigDict

from ._imagenet import imagenet_config

VARIANTS = {"small": "deit_small", "base": "deit_base"}


def get_config(argument: str = "") -> ConfigDict:
    config = imagenet_config("MAE's fine-tuning", argument, VARIANTS, default="base")
    config.reset_head = True  # the pre-trained encoder has no classifier
    config.model.update(drop_path_rate=0.1, global_pool="avg")
    # Uniform weights over 197 tokens are below the official threshold, 0.02: it would mask most of them from the start.
    config.mask.start_threshold = 0.8 / 197
    config.train.update(epochs=100, batch_size=1024)
    config.optimizer.update(
        learning_rate=5e-4,
        reference_batch=256,
        scaled_rates="peak",
        initial_learning_rate=0.0,
        final_learning_rate=1e-6,
        warmup_epochs=5.0,
        weight_decay=0.05,
        layer_decay=0.65,
    )
    return config
