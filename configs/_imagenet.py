"""The base of all recipes on ImageNet: the data, and DeiT's augmentations. It is not a configuration itself.

python -m castling_jax prepare imagenet2012 --help says how to get the data.
"""

from ml_collections import ConfigDict

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.training.config import default_config


def imagenet_config(family: str, argument: str, variants: dict[str, str], default: str) -> ConfigDict:
    """The configuration of one model of a family, which `--config=configs/FILE.py:VARIANT,ATTENTION` names.

    Args:
      family: name of the family, for messages.
      argument: "VARIANT", "VARIANT,ATTENTION" or ""; without an attention, castling.
      variants: names of the variants -> names of models in the registry.
      default: the variant for an empty argument.

    Raises:
      InputError: the variant or the attention is unknown.
    """
    words = argument.split(",") if argument else [default]
    if len(words) > 2:
        raise InputError(f"a configuration of {family} takes VARIANT,ATTENTION and no more, not {argument!r}.")
    variant, attention = words[0], words[1] if len(words) == 2 else "castling"
    check_known(f"variant of {family}", variant, variants)
    check_known("attention", attention, KINDS)
    config = default_config()
    config.model.update(name=variants[variant], attention=attention, dtype="bfloat16")
    config.dataset.update(
        name="imagenet2012",
        train_split="train",
        eval_split="validation",
        workers=8,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_ratio=0.875,
    )
    config.augment.update(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        randaugment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        mix_switch=0.5,
    )
    config.loss.label_smoothing = 0.1
    # DeiT's regularisation ends here; epochs, batch and rates are each recipe's own.
    config.evaluation.batch_size = 1024
    config.checkpoint.every_steps = 1000
    config.logging.every_steps = 50
    return config
