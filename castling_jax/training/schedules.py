"""What changes over training: the learning rate and the mask threshold."""

import math
from collections.abc import Callable

import optax
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import start_threshold
from castling_jax.errors import InputError

MASK_SCHEDULES = ("constant", "linear", "cosine")
SCALED_RATES = ("peak", "all")


def learning_rate_schedule(
    optimizer: ConfigDict, *, batch_size: int, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Linear warm-up, then a cosine from there to `final_learning_rate` behind the last step (MViTv2's recipe).

    DeiT's and LeViT's (timm's) cosine counts epochs from the start of the warm-up: theirs is at most 1.5 % of the peak
    away from this one.

    Rates that are given for batches of `reference_batch` images grow with the batch: the peak alone (DeiT, LeViT), or
    with `scaled_rates` = "all" those at the start and at the end too (MViTv2).

    With a peak of 0 all rates are 0.

    Raises:
      InputError: the warm-up is as long as the training or longer.
    """
    scale = 1.0 if optimizer.reference_batch is None else batch_size / optimizer.reference_batch
    ends = scale if optimizer.scaled_rates == "all" else 1.0
    warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise InputError(
            f"config.optimizer.warmup_epochs = {optimizer.warmup_epochs} leaves nothing of the {total_steps} steps."
        )
    if optimizer.learning_rate == 0:  # nothing is to be learnt, so neither at the start nor at the end
        return optax.constant_schedule(0.0)
    return optax.warmup_cosine_decay_schedule(
        init_value=ends * optimizer.initial_learning_rate,
        peak_value=scale * optimizer.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=ends * optimizer.final_learning_rate,
    )


def mask_threshold_schedule(mask: ConfigDict, *, total_steps: int) -> Callable[[int], float]:
    """The threshold of a step: from `start_threshold` to 1 between two fractions of training, or constant.

    At 1 the mask is empty, so a schedule that gets there makes the switch lossless. The paper only says that the mask
    is driven to zero. `start_threshold` None is 0.02, the value of its authors' block, and for a fade 0, the whole
    softmax.

    Returns:
      A function of the step, counted from 0, to a float; exactly 1.0 from the fraction `end` on, and of the last step.
    """
    start, begin, end = start_threshold(mask), mask.begin, mask.end

    def threshold(step: int) -> float:
        fraction = step / total_steps
        if mask.schedule == "constant":
            return start
        if fraction >= end or step >= total_steps - 1:
            return 1.0
        if fraction < begin:
            return start
        progress = (fraction - begin) / (end - begin)
        if mask.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (1 - start) * progress

    return threshold
