"""The base of the configurations for your own images: SIZE[,MODEL[,ATTENTION]]. It is not a configuration itself."""

from ml_collections import ConfigDict

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.registry import MODELS
from castling_jax.training.config import default_config

FEWEST_PIXELS = 96  # for deit_tiny: its patches have 16 x 16 pixels, so smaller images would have fewer than 36


def own_images(name: str, argument: str) -> ConfigDict:
    """The model and the pixels that `--config=NAME:SIZE,MODEL,ATTENTION` asks for.

    Raises:
      InputError: there is no SIZE, or the model or the attention is unknown.
    """
    size, model, attention, *more = f"{argument},,".split(",")
    if not size.isdecimal() or not int(size) or any(more):
        raise InputError(
            f"the configuration {name!r} takes SIZE[,MODEL[,ATTENTION]], as in {name}:224, not {argument!r}."
        )
    pixels = int(size)
    config = default_config()
    config.model.update(
        name=model or ("deit_tiny" if pixels >= FEWEST_PIXELS else "deit_micro"),
        attention=attention or "castling",
        image_size=pixels,
        drop_path_rate=0.1,
    )
    check_known("model", config.model.name, MODELS)  # the one that learns, or the backbone of it
    check_known("attention", config.model.attention, KINDS)
    # The largest patch that divides the image and leaves at least 7 patches along a side.
    if not model and pixels < FEWEST_PIXELS:
        config.model.patch_size = max(side for side in range(1, max(pixels // 7, 1) + 1) if pixels % side == 0)
    # ImageNet's mean and std, with which timm's weights were trained.
    config.dataset.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return config


def patches(config: ConfigDict) -> int:
    """How many patches an image has; a backbone without patches has about as many tokens as with 16 pixels a side."""
    _, defaults = MODELS[config.model.backbone or config.model.name]
    side = config.model.patch_size or getattr(defaults, "patch_size", 16)
    return (config.model.image_size // side) ** 2
