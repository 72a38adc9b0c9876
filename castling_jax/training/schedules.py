"""The schedules of training: the learning rate and the mask threshold."""

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
LONGEST_WARMUP = 5.0  # epochs of warm-up at most, if the configuration does not state them


def learning_rate_schedule(
    optimizer: ConfigDict, *, batch_size: int, total_steps: int, steps_per_epoch: int, earlier_ends: Sequence[int] = ()
) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `final_learning_rate` after the last step (MViTv2's recipe).

    The rate changes with every step. In DeiT's and LeViT's recipes (timm's schedule) it changes once an epoch: the
    first two epochs have the initial rate, 1e-6, and the warm-up reaches the peak an epoch later than here. Their
    cosine counts epochs from the start of the warm-up; it differs from this one by at most 1.5 % of the peak.

    The rates are stated for batches of `reference_batch` images, and grow in proportion to the batch: only the peak
    (DeiT, LeViT), or with `scaled_rates` = "all" also the initial and the final rate (MViTv2).

    With a peak of 0 all rates are 0.

    Args:
      optimizer: the group `optimizer` of the configuration.
      batch_size: images in a step.
      total_steps: steps of the run.
      steps_per_epoch: whole batches in an epoch.
      earlier_ends: for an extended run, its total steps before each extension. Each step follows the schedule of the
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
    shortest = min((*earlier_ends, total_steps))  # every schedule of an extended run needs steps after its warm-up
    if warmup_steps >= shortest:
        epochs = f"{shortest / steps_per_epoch:g} epochs ({shortest} steps)"
        raise InputError(f"config.optimizer.warmup_epochs must be below the run's {epochs}, not {warmup_epochs}.")
    if optimizer.learning_rate == 0:  # the user wants no learning, so the initial and final rates must not count
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
    # From the last end back to the first, so that the first end's switch is the outermost.
    for end, before in zip(reversed(earlier_ends), reversed(earlier), strict=True):
        schedule = _switched_at(end, before, schedule)
    return schedule


def default_warmup(epochs: float) -> float:
    """Epochs of warm-up for a run of so many epochs whose configuration does not state them."""
    return min(LONGEST_WARMUP, epochs / 10)


def _switched_at(end: int, before: optax.Schedule, after: optax.Schedule) -> optax.Schedule:
    """The schedule `before` for the steps before `end`, and `after` from `end` on."""

    def schedule(step: Any) -> jax.Array:
        return jnp.where(jnp.asarray(step) < end, before(step), after(step))

    return schedule


def mask_threshold_schedule(
    mask: ConfigDict, *, total_steps: int, earlier_ends: Sequence[int] = ()
) -> Callable[[int], float]:
    """The mask threshold over training: constant, or rising from `start_threshold` to 1 between two fractions of it.

    At 1 the mask is empty, so a schedule that reaches 1 makes the switch lossless. The paper only says that the mask is
    driven to zero. A `start_threshold` of None means 0.02, as in the paper authors' block, and for a fade 0, the whole
    softmax.

    Args:
      mask: the group `mask` of the configuration.
      total_steps: steps of the run.
      earlier_ends: for an extended run, its total steps before each extension. Each step follows the schedule of the
        first end after it, but the threshold never falls below the highest one so far.

    Returns:
      A function: step, counted from 0 -> threshold. Unless the schedule is constant, it is exactly 1.0 from the
      fraction `end` on, and at the last step.
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
    if fraction >= end or step >= total_steps - 1:  # even with end = 1 the last step trains with an empty mask
        return 1.0
    if fraction < begin:
        return start
    progress = (fraction - begin) / (end - begin)
    if mask.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (1 - start) * progress
