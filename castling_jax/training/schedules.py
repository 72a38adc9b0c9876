"""What changes over training: the learning rate and the mask threshold."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import start_threshold
from castling_jax.errors import InputError

MASK_SCHEDULES = ("constant", "linear", "cosine")
SCALED_RATES = ("peak", "all")
LONGEST_WARMUP = 5.0  # epochs, where the configuration does not say them


def learning_rate_schedule(
    optimizer: ConfigDict, *, batch_size: int, total_steps: int, steps_per_epoch: int, earlier_ends: Sequence[int] = ()
) -> optax.Schedule:
    """Linear warm-up, then a cosine from there to `final_learning_rate` after the last step (MViTv2's recipe).

    The rate is a function of the step. In DeiT's and LeViT's recipes (timm's schedule) it changes after each epoch: the
    first two epochs have the initial rate, 1e-6, and the warm-up's last step up comes an epoch later than here. Their
    cosine counts epochs from the start of the warm-up, and stays within 1.5 % of the peak of this one.

    Rates that are stated for batches of `reference_batch` images grow with the batch: the peak alone (DeiT, LeViT), or
    with `scaled_rates` = "all" those at the start and at the end too (MViTv2).

    With a peak of 0 all rates are 0.

    Args:
      optimizer: the configuration's group.
      batch_size: images a step.
      total_steps: of the run.
      steps_per_epoch: whole batches.
      earlier_ends: total steps of a run that was extended, before each extension. Each step follows the schedule of the
        first end after it.

    Raises:
      InputError: the warm-up is as long as the training or longer.
    """
    scale = 1.0 if optimizer.reference_batch is None else batch_size / optimizer.reference_batch
    ends = scale if optimizer.scaled_rates == "all" else 1.0
    warmup_epochs = optimizer.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = default_warmup(total_steps / steps_per_epoch)
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    shortest = min((*earlier_ends, total_steps))
    if warmup_steps >= shortest:
        raise InputError(f"config.optimizer.warmup_epochs = {warmup_epochs} leaves nothing of the {shortest} steps.")
    if optimizer.learning_rate == 0:  # nothing is to be learnt, so neither at the start nor at the end
        return optax.constant_schedule(0.0)
    *earlier, schedule = (
        optax.warmup_cosine_decay_schedule(
            init_value=ends * optimizer.initial_learning_rate,
            peak_value=scale * optimizer.learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=end,
            end_value=ends * optimizer.final_learning_rate,
        )
        for end in (*earlier_ends, total_steps)
    )
    for end, before in zip(reversed(earlier_ends), reversed(earlier), strict=True):
        schedule = _switched_at(end, before, schedule)
    return schedule


def default_warmup(epochs: float) -> float:
    """The epochs of the warm-up of a run of so many epochs, where its configuration does not say them."""
    return min(LONGEST_WARMUP, epochs / 10)


def _switched_at(end: int, before: optax.Schedule, after: optax.Schedule) -> optax.Schedule:
    """One schedule for the steps before `end`, and another from it on."""

    def schedule(step: Any) -> jax.Array:
        return jnp.where(jnp.asarray(step) < end, before(step), after(step))

    return schedule


def mask_threshold_schedule(
    mask: ConfigDict, *, total_steps: int, earlier_ends: Sequence[int] = ()
) -> Callable[[int], float]:
    """The threshold of a step: from `start_threshold` to 1 between two fractions of training, or constant.

    At 1 the mask is empty, so a schedule that gets there makes the switch lossless. The paper only says that the mask
    is driven to zero. `start_threshold` None is 0.02, the value of its authors' block, and for a fade 0, the whole
    softmax.

    Args:
      mask: the configuration's group.
      total_steps: of the run.
      earlier_ends: total steps of a run that was extended, before each extension. Each step follows the schedule of the
        first end after it, but never falls below the threshold that the run had reached.

    Returns:
      A function of the step, counted from 0, to a float; exactly 1.0 from the fraction `end` on, and of the last step.
    """

    def threshold(step: int) -> float:
        reached = 0.0
        for end in earlier_ends:
            if step < end:
                return max(reached, _threshold(mask, step, end))
            reached = max(reached, _threshold(mask, end - 1, end))
        return max(reached, _threshold(mask, step, total_steps))

    return threshold


def _threshold(mask: ConfigDict, step: int, total_steps: int) -> float:
    """The threshold of a step in a run that was never extended."""
    start, begin, end = start_threshold(mask), mask.begin, mask.end
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
