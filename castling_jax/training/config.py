"""Every field a configuration has, with its default; configs/*.py change what they need."""

import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

from castling_jax.data.transforms import check_augment
from castling_jax.errors import InputError, check_known
from castling_jax.models.variables import flatten
from castling_jax.training.losses import DISTILLATIONS

CONFIG_FILE = "config.json"  # a run's own, in its folder
# Groups and fields that concern how a run runs, not what comes of it: they may differ when a run goes on.
RUNTIME_GROUPS = ("mesh", "evaluation", "checkpoint", "logging")
RUNTIME_FIELDS = ("dataset/data_dir", "dataset/workers", "dataset/max_corrupt_share")
# What must lie between two numbers, neither of them allowed.
OPEN_RANGES = {
    "train.ema_decay": (0, 1),
    "optimizer.clip_norm": (0, float("inf")),
    "optimizer.adaptive_clip": (0, float("inf")),
    "optimizer.reference_batch": (0, float("inf")),
    "distillation.alpha": (0, 1),
    "distillation.temperature": (0, float("inf")),
}


def default_config() -> ConfigDict:
    """A configuration with all fields. Lengths of time are in epochs or steps, as their names say."""
    return ConfigDict(
        {
            "seed": 0,
            # Where a new run starts: timm's weights of the softmax model (.safetensors, .pth), or a run's folder.
            "init_from": config_dict.placeholder(str),
            "reset_head": False,  # whether a classifier of another number of classes starts anew
            # Arguments of create_model. None: the model's own.
            "model": {
                "name": "deit_tiny",
                "attention": "castling",
                "dtype": "float32",
                "image_size": config_dict.placeholder(int),
                # A number, or of LeViT a tuple with one for each stage; MViTv2 has `depths`.
                "embed_dim": config_dict.placeholder(object),
                "depth": config_dict.placeholder(object),
                "depths": config_dict.placeholder(object),
                "num_heads": config_dict.placeholder(object),
                "key_dim": config_dict.placeholder(int),
                "patch_size": config_dict.placeholder(int),
                "mlp_ratio": config_dict.placeholder(float),
                "qkv_bias": config_dict.placeholder(bool),
                "distilled": config_dict.placeholder(bool),
                "drop_path_rate": config_dict.placeholder(float),
                "remat": config_dict.placeholder(bool),  # compute blocks again in the backward pass: less memory
                "token_conv": config_dict.placeholder(str),  # "none": no convolution
                "token_kernel_size": config_dict.placeholder(int),
                "init_std": config_dict.placeholder(float),
            },
            "dataset": {
                "name": "digits",
                "train_split": "train",
                "eval_split": "test",
                "data_dir": config_dict.placeholder(str),  # tensorflow-datasets'; None: where it puts them
                "workers": 0,  # processes that read and augment; 0: threads of the training process
                "max_corrupt_share": 0.001,  # of the images read; a run stops above it
                # Of the channels, in [0, 1]: what the model sees is (image - mean) / std.
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
                # An image is resized so that its short side is image_size / crop_ratio, and its middle is cut out.
                "crop_ratio": 0.875,
            },
            # Of training images, in this order. What is 0 or None is not done.
            "augment": {
                # Random resized crop: its least and largest share of the image, as (0.08, 1.0).
                "crop_scale": config_dict.placeholder(tuple),
                "flip": 0.0,  # probability of a mirror image
                "randaugment": config_dict.placeholder(str),  # timm's policy, as "rand-m9-mstd0.5-inc1"
                "color_jitter": 0.0,  # brightness, contrast and saturation, times up to 1 +- this
                "shift_pixels": 0,  # largest random shift
                "erasing": 0.0,  # probability of random erasing
                "repeats": 1,  # how many times in a row of the shuffled examples each of them comes
                # Of batches: the alphas of mixup and CutMix, the probability of CutMix where there are both, and that
                # of mixing at all.
                "mixup": 0.0,
                "cutmix": 0.0,
                "mix_switch": 0.5,
                "mix_probability": 1.0,
            },
            "train": {
                "epochs": 100,
                "batch_size": 128,  # of all devices together
                "accumulate_steps": 1,  # parts of a batch that go through the model one after the other: less memory
                # Of the moving average of the variables, which then is what is evaluated and switched; None: none.
                "ema_decay": config_dict.placeholder(float),
            },
            "optimizer": {
                "learning_rate": 1e-3,  # the peak
                # Images a batch that the rates are for, with which they grow: the "peak" alone or "all". None: as is.
                "reference_batch": config_dict.placeholder(int),
                "scaled_rates": "peak",
                "initial_learning_rate": 1e-6,  # where the warm-up starts
                "final_learning_rate": 1e-5,  # where the cosine ends
                "warmup_epochs": 5.0,
                "weight_decay": 0.05,  # on matrices only
                "b1": 0.9,
                "b2": 0.999,
                "clip_norm": config_dict.placeholder(float),  # of all gradients together; None: not clipped
                "adaptive_clip": config_dict.placeholder(float),  # of each unit's, as a share of its weights' norm
            },
            "loss": {"label_smoothing": 0.1},
            # A teacher whose decisions ("hard") or probabilities ("soft") are learnt besides; None: none. In a
            # distilled model by the second head.
            "distillation": {
                "kind": config_dict.placeholder(str),
                "alpha": 0.5,  # the teacher's share of the loss
                "temperature": 3.0,  # of "soft"
                # A run's folder, an inference folder, or timm's weights of the model `name`, in softmax attention.
                "teacher": config_dict.placeholder(str),
                "name": config_dict.placeholder(str),  # None: the run's own model
            },
            # The threshold stays at start_threshold until the fraction `begin` of training, and is 1 from `end` on.
            "mask": {"schedule": "cosine", "start_threshold": 0.02, "begin": 0.2, "end": 0.8},
            # Sizes of the mesh's axes; one may be -1, what the others leave. `replica`: copies, one or more to each
            # slice of a pod; `data`: more copies; `fsdp`: splits the matrices as well as the batch; `tensor`: heads.
            "mesh": {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "evaluation": {"every_epochs": 1, "batch_size": 128},
            # The newest `keep` stay, and the best that was evaluated.
            "checkpoint": {"every_steps": 500, "keep": 2},
            "logging": {"every_steps": 20, "tensorboard": True, "progress": True},
        }
    )


def load_config(name: str) -> ConfigDict:
    """The configuration of FILE.py or FILE.py:ARGUMENT, as main.py reads it.

    Raises:
      InputError: there is no such file, it makes no configuration, or a field is wrong.
    """
    path, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise InputError(f"there is no configuration file '{path}'.")
    sys.path.insert(0, str(Path(path).resolve().parents[1]))  # configurations are made of one another
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"'{path}' is no configuration: it has no function get_config.")
    if argument and not inspect.signature(module.get_config).parameters:
        raise InputError(f"'{path}' has no variants: leave out {':' + argument!r}.")
    config = module.get_config(argument) if argument else module.get_config()
    check_config(config)
    return config


def field_names() -> list[str]:
    """Dotted names of all fields, as on the command line behind `--config.`."""
    return [path.replace("/", ".") for path in flatten(default_config().to_dict())]


def check_config(config: ConfigDict) -> None:
    """Refuses a configuration with other fields than `default_config` has, or with values out of range.

    Raises:
      InputError: names the field, and the nearest known one, or the value and what is allowed.
    """
    given = {path.replace("/", "."): value for path, value in flatten(config.to_dict()).items()}
    known = field_names()
    for name in given:
        check_known("config field", name, known)
    for name in known:
        if name not in given:
            raise InputError(f"the configuration lacks the field {name!r}; start it from default_config().")
    for name in (
        "train.epochs",
        "train.batch_size",
        "train.accumulate_steps",
        "evaluation.every_epochs",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "logging.every_steps",
    ):
        if not given[name] >= 1:  # which NaN is not
            raise InputError(f"config.{name} must be at least 1, not {given[name]}.")
    for name in (
        "seed",
        "optimizer.learning_rate",
        "optimizer.initial_learning_rate",
        "optimizer.final_learning_rate",
        "optimizer.warmup_epochs",
        "optimizer.weight_decay",
        "dataset.workers",
    ):
        if not 0 <= given[name] < math.inf:
            raise InputError(f"config.{name} must be at least 0, not {given[name]}.")
    if not 0 <= given["dataset.max_corrupt_share"] <= 1:
        raise InputError(
            f"config.dataset.max_corrupt_share must be in [0, 1], not {given['dataset.max_corrupt_share']}."
        )
    for name in ("model.embed_dim", "model.depth", "model.depths", "model.num_heads"):
        sizes = given[name] if isinstance(given[name], tuple | list) else [given[name]]
        if given[name] is not None and not all(isinstance(size, int) for size in sizes):
            raise InputError(f"config.{name} must be an integer or a tuple of integers, not {given[name]}.")
    for name in ("dataset.mean", "dataset.std"):
        if len(given[name]) != 3 or (name == "dataset.std" and min(given[name]) <= 0):
            above = " above 0" if name == "dataset.std" else ""
            raise InputError(f"config.{name} must be three numbers{above}, not {given[name]}.")
    if not 0 < given["dataset.crop_ratio"] <= 1:
        raise InputError(f"config.dataset.crop_ratio must be in (0, 1], not {given['dataset.crop_ratio']}.")
    check_augment(config.augment)
    if (kind := given["distillation.kind"]) is not None:
        check_known("config.distillation.kind", kind, DISTILLATIONS)
    for name, (low, high) in OPEN_RANGES.items():
        if given[name] is not None and not low < given[name] < high:
            raise InputError(f"config.{name} must be above {low} and below {high}, not {given[name]}.")
    for name in ("loss.label_smoothing", "optimizer.b1", "optimizer.b2"):
        if not 0 <= given[name] < 1:
            raise InputError(f"config.{name} must be in [0, 1), not {given[name]}.")


def model_arguments(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `create_model` that the configuration gives."""
    arguments = {name: value for name, value in config.model.to_dict().items() if value is not None}
    if arguments.get("token_conv") == "none":
        arguments["token_conv"] = None
    return arguments


def image_options(config: ConfigDict, image_size: int) -> dict[str, Any]:
    """How images come to be as a model of this size takes them: the arguments of `eval_transform`."""
    data = config.dataset
    return {"image_size": image_size, "mean": data.mean, "std": data.std, "crop_ratio": data.crop_ratio}


def mixing_options(config: ConfigDict) -> dict[str, Any]:
    """How batches are mixed: what `mix` takes of them."""
    augment = config.augment
    return {
        "mixup": augment.mixup,
        "cutmix": augment.cutmix,
        "switch": augment.mix_switch,
        "probability": augment.mix_probability,
    }


def check_same_run(config: ConfigDict, path: epath.Path) -> None:
    """Refuses to go on in a folder whose config.json, at `path`, is another configuration's.

    A field that the folder's configuration lacks, because it is of an earlier version, has its default there.

    Raises:
      InputError: the file is damaged, or fields differ that are not RUNTIME_GROUPS' or RUNTIME_FIELDS; names them.
    """
    try:
        earlier = json.loads(path.read_text())
        if not isinstance(earlier, dict):
            raise ValueError("it holds no object")
    except (ValueError, OSError) as error:
        raise InputError(f"'{path}' is missing or damaged ({error}); choose another --workdir or remove it.") from error
    defaults, earlier, now = (
        flatten(json.loads(json.dumps(tree))) for tree in (default_config().to_dict(), earlier, config.to_dict())
    )
    earlier = defaults | earlier
    different = [
        f"config.{name.replace('/', '.')} = {earlier.get(name)!r}, not {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if name.split("/")[0] not in RUNTIME_GROUPS
        and name not in RUNTIME_FIELDS
        and earlier.get(name) != now.get(name)
    ]
    if different:
        raise InputError(
            f"'{path.parent}' holds a run with {'; '.join(different)}: choose another --workdir, or remove that folder "
            "to start anew."
        )
