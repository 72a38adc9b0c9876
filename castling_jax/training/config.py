"""Every field of a configuration, one line each; configs/*.py change the ones they need."""

import itertools
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from castling_jax.data.randaugment import parse_policy
from castling_jax.errors import InputError, Mistakes, check_at_most, check_known
from castling_jax.fields import FLAG, IMAGE_SIZE, SIZES, TEXT, Field, Values, integer, number, numbers, one_of
from castling_jax.models.variables import flatten, unflatten
from castling_jax.ops.castling import MASK_KINDS
from castling_jax.ops.checks import IMPLEMENTATIONS
from castling_jax.postprocessing import VALUES as BOXES
from castling_jax.preprocessing import VALUES as PIXELS
from castling_jax.tasks.classification.losses import DISTILLATIONS
from castling_jax.training.schedules import MASK_SCHEDULES, SCALED_RATES

# Groups and fields that change how a run proceeds but not its result: they may differ when a run is resumed.
RUNTIME_GROUPS = ("mesh", "evaluation", "checkpoint", "logging")
RUNTIME_FIELDS = (
    "model.implementation",
    "dataset.data_dir",
    "dataset.workers",
    "dataset.max_corrupt_share",
    "dataset.accept_changes",
    "train.on_nonfinite",
    "train.max_skips",
)
# If one of these fields is None, the run fills it in, from its data or its length. config.json holds the value, and a
# resumed run keeps it.
FOUND_FIELDS = (
    "dataset.train_split",
    "dataset.eval_split",
    "train.batch_size",
    "train.extended_from",
    "optimizer.warmup_epochs",
)
ON_NONFINITE = ("stop", "skip")
EXPORTS = ("raw", "averaged")

SCALE_RANGE = numbers(2, "two numbers with 0 < first <= second", lambda scale: 0 < scale[0] <= scale[1])
CROP_SCALE = numbers(2, "two numbers with 0 < first <= second <= 1", lambda scale: 0 < scale[0] <= scale[1] <= 1)

IMAGE_SIZES = Values(
    tuple,
    "a tuple of positive integers",
    lambda sizes: (
        isinstance(sizes, tuple | list)
        and len(sizes) > 0
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    ),
)

EPOCHS = Values(
    tuple,
    "a tuple of ascending positive integers",
    lambda ends: (
        isinstance(ends, tuple | list)
        and all(isinstance(end, int) for end in ends)
        and all(before < end for before, end in itertools.pairwise((0, *ends)))
    ),
)

# Dotted name -> default, values, meaning. If the default is None, None is allowed too.
FIELDS = {
    "seed": Field(0, integer(0, 2**32 - 1), "Seed of all random draws: parameters, order of examples, augmentations."),
    "init_from": Field(None, TEXT, "Where a new run starts: timm's weights (.safetensors, .npz, .pth), or a run."),
    "reset_head": Field(False, FLAG, "Start the head anew where init_from has another number of classes."),
    "init_ema": Field(None, FLAG, "Whether to read init_from's moving average. None: what its run exports, else raw."),
    # Arguments of create_model. None takes the model's default.
    "model.name": Field("deit_tiny", TEXT, "The model, by its name in create_model."),
    "model.attention": Field("castling", TEXT, "The attention kind, such as castling, linear_angular or softmax."),
    "model.dtype": Field("float32", TEXT, "Compute dtype: float32 or bfloat16. Parameters stay in float32."),
    "model.implementation": Field("auto", one_of(*IMPLEMENTATIONS), "The attention's code: auto, xla or pallas (TPU)."),
    "model.image_size": Field(None, IMAGE_SIZE, "Size of the images in pixels: a side, or (height, width)."),
    "model.embed_dim": Field(None, SIZES, "Channels; for LeViT a tuple, one for each stage."),
    "model.depth": Field(None, SIZES, "Number of blocks; for LeViT a tuple, one for each stage."),
    "model.depths": Field(None, SIZES, "Number of blocks in each stage of MViTv2, a tuple."),
    "model.num_heads": Field(None, SIZES, "Attention heads; for LeViT a tuple, one for each stage."),
    "model.key_dim": Field(None, integer(1), "Channels of a head's queries and keys in LeViT."),
    "model.patch_size": Field(None, integer(1), "Height and width of DeiT's patches in pixels."),
    "model.mlp_ratio": Field(None, number("(0, inf)"), "Hidden channels of an MLP, divided by its input channels."),
    "model.qkv_bias": Field(None, FLAG, "Whether the projections to queries, keys and values have a bias."),
    "model.distilled": Field(None, FLAG, "Whether the model has a second head, which learns from a teacher."),
    "model.drop_path_rate": Field(None, number("[0, 1)"), "Stochastic depth: highest probability to drop a branch."),
    "model.remat": Field(None, FLAG, "Recompute the blocks in the backward pass: less memory, more time."),
    "model.token_conv": Field(None, TEXT, "Convolution of the values: 1d over tokens, 2d over the grid, or none."),
    "model.token_kernel_size": Field(None, integer(1), "Taps of token_conv along each axis; an odd number."),
    "model.window_size": Field(None, integer(1), "Side of the windows of window attention, in tokens. None is 7."),
    "model.qkv_pool": Field(None, one_of("3x3"), "Depthwise convolutions of DeiT's queries, keys and values, or none."),
    "model.init_std": Field(None, number("(0, inf)"), "Standard deviation of the initial weights."),
    "model.global_pool": Field(None, one_of("token", "avg"), "What DeiT's classifier reads: class token or mean."),
    "model.backbone": Field(None, TEXT, "The classifier that a detector, a segmenter or an autoencoder is built on."),
    "model.neck": Field(None, one_of("lc_pan", "csp_pan"), "A detector's neck and head: PicoDet's v2, or legacy."),
    "model.neck_channels": Field(None, integer(1), "Channels of a detector's neck and head."),
    "model.num_convs": Field(None, integer(1), "Separable convolutions in each of a detector's heads."),
    "model.head_channels": Field(None, integer(1), "Channels of a segmenter's head."),
    "model.mask_ratio": Field(None, number("(0, 1)"), "Share of the patches that a masked autoencoder hides."),
    "model.norm_pix_loss": Field(None, FLAG, "Whether a masked autoencoder predicts patches with mean 0, variance 1."),
    "model.decoder_embed_dim": Field(None, integer(1), "Channels of a masked autoencoder's decoder."),
    "model.decoder_depth": Field(None, integer(1), "Number of the decoder's blocks."),
    "model.decoder_num_heads": Field(None, integer(1), "Heads of the decoder's attention."),
    "dataset.name": Field("digits", TEXT, "digits; folder:, images:, npz:, coco:, voc:, masks:PATH; or TFDS's name."),
    "dataset.train_split": Field(None, TEXT, "The split to learn from. None: train, without its held-out part."),
    "dataset.eval_split": Field(None, TEXT, "The held-out split. None: val, validation, test, or a tenth of train."),
    "dataset.test_split": Field(None, TEXT, "The split for the summary, tested once at the end. None: eval_split."),
    "dataset.data_dir": Field(None, TEXT, "Where tensorflow-datasets keeps its data; None is its own default."),
    "dataset.workers": Field(0, integer(0), "Processes that read and augment images; 0 uses the run's own threads."),
    "dataset.max_corrupt_share": Field(0.001, number("[0, 1]"), "Share of unreadable images above which a run stops."),
    "dataset.accept_changes": Field(False, FLAG, "Resume although images have changed; classes must be the same."),
    "dataset.ignore_label": Field(255, integer(0, 255), "Segmentation: the number of pixels without a class in masks."),
    "dataset.first_label": Field(0, integer(0, 253), "Segmentation: the first class's number in masks."),
    "dataset.mean": Field((0.5,) * 3, PIXELS["mean"], "The model sees (image - mean) / std, with the image in [0, 1]."),
    "dataset.std": Field((0.5,) * 3, PIXELS["std"], "The model sees (image - mean) / std."),
    "dataset.crop_ratio": Field(0.875, PIXELS["crop_ratio"], "Share of the short side that evaluation keeps."),
    "dataset.crop_mode": Field("center", PIXELS["crop_mode"], "center cuts, squash squeezes, slide moves a window."),
    "dataset.interpolation": Field("bicubic", PIXELS["interpolation"], "How images are resized, always antialiased."),
    "dataset.exif": Field(False, FLAG, "Turn images as their EXIF orientation says; TFDS and torchvision do not."),
    # Augmentations of training images. 0, False or None turns one off.
    "augment.crop_scale": Field(None, CROP_SCALE, "Random resized crop: least and largest share of the image's area."),
    "augment.flip": Field(0.0, number("[0, 1]"), "Probability of a horizontal flip."),
    "augment.randaugment": Field(None, TEXT, "RandAugment, by timm's name: rand-m9-mstd0.5-inc1 and the like."),
    "augment.color_jitter": Field(0.0, number("[0, inf)"), "Largest change of brightness, contrast and saturation."),
    "augment.shift_pixels": Field(0, integer(0), "Largest random shift along each axis in pixels."),
    "augment.erasing": Field(0.0, number("[0, 1]"), "Probability of random erasing."),
    "augment.scale_range": Field(None, SCALE_RANGE, "Segmentation: least and largest factor of the random scale."),
    "augment.box_crop": Field(False, FLAG, "Detection: SSD's random crop, by its overlap with the image's boxes."),
    "augment.distort": Field(0.0, number("[0, 1]"), "Dense tasks: probability of each of SSD's changes of colour."),
    "augment.image_sizes": Field(None, IMAGE_SIZES, "Detection: sides of squares, one a step. None: the model's size."),
    "augment.max_boxes": Field(100, integer(1), "Detection: most boxes to learn from in an image; more are left out."),
    "augment.repeats": Field(1, integer(1), "Repeated augmentation: how often in a row an example comes."),
    "augment.mixup": Field(0.0, number("[0, inf)"), "Alpha of mixup, which mixes pairs of a batch's images."),
    "augment.cutmix": Field(0.0, number("[0, inf)"), "Alpha of CutMix, which pastes a box of another image."),
    "augment.mix_switch": Field(0.5, number("[0, 1]"), "Probability of CutMix instead of mixup, if both are on."),
    "augment.mix_probability": Field(1.0, number("[0, 1]"), "Probability that a batch is mixed at all."),
    "augment.mix_rows": Field(None, integer(1), "Rows of a batch that share one draw of mixing. None: all of them."),
    "train.epochs": Field(100, integer(1), "Passes over the training split; each is a whole number of batches."),
    "train.batch_size": Field(None, integer(1), "Images a step, over all devices. None: 128, or fewer for few images."),
    "train.accumulate_steps": Field(1, integer(1), "Parts of a batch, computed one after another: less memory."),
    "train.ema_decay": Field(None, number("(0, 1)"), "EMA decay; when set, averaged weights are evaluated as well."),
    "train.ema_warmup": Field(True, FLAG, "Whether the decay of step k is at most (1 + k) / (10 + k)."),
    "train.export": Field(None, one_of(*EXPORTS), "Weights to export. None: averaged if ema_decay is set, else raw."),
    "train.extended_from": Field(None, EPOCHS, "Epochs at which a run ended before --extend, which fills this in."),
    "train.on_nonfinite": Field("stop", one_of(*ON_NONFINITE), "What to do at a loss or gradient that is not finite."),
    "train.max_skips": Field(10, integer(1), "Skipped steps in a row that end the run."),
    "optimizer.name": Field("adamw", one_of("adamw", "sgd"), "The optimiser: AdamW, or SGD with momentum."),
    "optimizer.learning_rate": Field(1e-3, number("[0, inf)"), "Peak of the learning rate."),
    "optimizer.reference_batch": Field(None, integer(1), "Batch size that the rates are meant for. None: any."),
    "optimizer.scaled_rates": Field("peak", one_of(*SCALED_RATES), "Rates to scale by batch_size / reference_batch."),
    "optimizer.initial_learning_rate": Field(1e-6, number("[0, inf)"), "Learning rate at the start of the warm-up."),
    "optimizer.final_learning_rate": Field(1e-5, number("[0, inf)"), "Learning rate at the end of the cosine."),
    "optimizer.warmup_epochs": Field(None, number("[0, inf)"), "Linear warm-up. None: 5, or a tenth of train.epochs."),
    "optimizer.weight_decay": Field(0.05, number("[0, inf)"), "Decay of matrices; SGD adds it to the gradients."),
    "optimizer.b1": Field(0.9, number("[0, 1)"), "AdamW's decay of the mean."),
    "optimizer.b2": Field(0.999, number("[0, 1)"), "AdamW's decay of the mean square."),
    "optimizer.momentum": Field(0.9, number("[0, 1)"), "SGD's momentum."),
    "optimizer.clip_norm": Field(None, number("(0, inf)"), "Largest norm of all gradients together."),
    "optimizer.layer_decay": Field(None, number("(0, 1]"), "A block's learning rate over that of the next block."),
    "optimizer.adaptive_clip": Field(None, number("(0, inf)"), "Largest gradient norm / weight norm of a unit."),
    "loss.label_smoothing": Field(0.1, number("[0, 1)"), "Classification: share of a label spread over all classes."),
    "loss.atss_epochs": Field(100.0, number("[0, inf)"), "Detection: epochs with ATSS, before TAL assigns the boxes."),
    "loss.dice": Field(0.0, number("[0, inf)"), "Segmentation: weight of the dice loss beside the cross entropy."),
    "distillation.kind": Field(None, one_of(*DISTILLATIONS), "Learn a teacher's decisions, or probabilities (soft)."),
    "distillation.alpha": Field(0.5, number("(0, 1)"), "The teacher's share of the loss."),
    "distillation.temperature": Field(3.0, number("(0, inf)"), "Temperature of the soft loss."),
    "distillation.teacher": Field(None, TEXT, "A run, an inference folder, or timm's weights of distillation.name."),
    "distillation.name": Field(None, TEXT, "The teacher's model, with softmax attention; None is the run's own model."),
    "mask.kind": Field("threshold", one_of(*MASK_KINDS), "What empties the softmax branch: a mask, or a fade."),
    "mask.schedule": Field("cosine", one_of(*MASK_SCHEDULES), "How the mask threshold rises to 1."),
    "mask.start_threshold": Field(None, number("[0, 1]"), "The threshold until mask.begin. None: 0.02, or 0 for fade."),
    "mask.begin": Field(0.2, number("[0, 1]"), "Fraction of training from which the threshold rises."),
    "mask.end": Field(0.8, number("[0, 1]"), "Fraction of training from which the threshold is 1."),
    # Sizes of the mesh's axes; one may be -1, for all devices that the other axes leave.
    "mesh.replica": Field(1, integer(-1), "Copies of the parameters: one or more on each slice of a pod."),
    "mesh.data": Field(-1, integer(-1), "More copies; replica, data and fsdp split the batch."),
    "mesh.fsdp": Field(1, integer(-1), "Splits the parameters' matrices as well."),
    "mesh.tensor": Field(1, integer(-1), "Splits the attention heads."),
    "evaluation.every_epochs": Field(1, integer(1), "Epochs between evaluations; the last step is always evaluated."),
    "evaluation.batch_size": Field(128, integer(1), "Images a step of the evaluation, over all devices."),
    "evaluation.score_threshold": Field(0.025, BOXES["score_threshold"], "Detection: scores above it count."),
    "evaluation.iou_threshold": Field(0.6, BOXES["iou_threshold"], "Detection: largest IoU of two boxes of a class."),
    "evaluation.max_detections": Field(100, BOXES["max_detections"], "Detection: most boxes in an image."),
    "checkpoint.every_steps": Field(500, integer(1), "Steps between checkpoints."),
    "checkpoint.every_minutes": Field(10.0, number("(0, inf)"), "Minutes between checkpoints, by process 0's clock."),
    "checkpoint.keep": Field(2, integer(1), "How many of the newest checkpoints stay, besides the best."),
    "logging.every_steps": Field(20, integer(1), "Steps between lines of metrics.jsonl."),
    "logging.tensorboard": Field(True, FLAG, "Whether to write TensorBoard's events."),
    "logging.progress": Field(True, FLAG, "Whether to show progress: a bar on a terminal, else lines."),
}


def check_unused(config: ConfigDict, unused: Collection[str], user: str) -> None:
    """Refuses values in fields that have no effect.

    Args:
      config: a configuration.
      unused: names of the fields.
      user: what does not use them.

    Raises:
      InputError: a field of `unused` is not at its default; the message names all such fields.
    """
    values = _values(config)
    if changed := [f"config.{name}" for name in FIELDS if name in unused and values[name] != FIELDS[name].default]:
        raise InputError(f"{user} does not use {', '.join(changed)}: keep the default.")


def default_config() -> ConfigDict:
    """A configuration with all FIELDS at their defaults."""
    return ConfigDict(unflatten({name.replace(".", "/"): field.placeholder for name, field in FIELDS.items()}))


def check_config(config: ConfigDict) -> None:
    """Refuses a configuration whose fields are not FIELDS, or whose values are not allowed.

    Raises:
      InputError: names each unknown field with the nearest known one, and each wrong value with what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise InputError(f"a configuration must be a ConfigDict, as load_config gives it, not {type(config).__name__}.")
    values = _values(config)
    mistakes = Mistakes()
    for name in values:
        with mistakes:
            check_known("config field", name, FIELDS)
    for name, field in FIELDS.items():
        with mistakes:
            if name not in values:
                raise InputError(f"the configuration lacks the field {name!r}; start it from default_config().")
            field.check(f"config.{name}", values[name])
    # Each value is of the right type from here on, so fields can be compared with each other.
    mistakes.report()
    with mistakes:
        check_at_most("config.mask.begin", config.mask.begin, config.mask.end, "config.mask.end")
    with mistakes:
        if (ends := config.train.extended_from) and ends[-1] >= config.train.epochs:
            raise InputError(
                f"config.train.extended_from = {ends} must end below train.epochs = {config.train.epochs}."
            )
    with mistakes:
        rows, batch_size = config.augment.mix_rows, config.train.batch_size
        if rows is not None and batch_size is not None and rows < batch_size and batch_size % rows:
            raise InputError(f"config.augment.mix_rows = {rows} does not divide config.train.batch_size, {batch_size}.")
    with mistakes:
        if config.train.export == "averaged" and config.train.ema_decay is None:
            raise InputError("config.train.export = 'averaged' needs an average: give config.train.ema_decay.")
    if config.augment.randaugment is not None:
        with mistakes:
            parse_policy(config.augment.randaugment, (0, 0, 0))
        with mistakes:
            if jitter := config.augment.color_jitter:
                raise InputError(f"config.augment.color_jitter must be 0 where randaugment is set, not {jitter}.")
    mistakes.report()


def _values(config: ConfigDict) -> dict[str, Any]:
    """Field -> value."""
    return {path.replace("/", "."): value for path, value in flatten(config.to_dict()).items()}
