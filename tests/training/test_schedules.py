import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.errors import InputError
from castling_jax.training.config import default_config
from castling_jax.training.schedules import MASK_SCHEDULES, learning_rate_schedule, mask_threshold_schedule


def mask(**changes):
    config = default_config().mask
    config.update(changes)
    return config


def test_learning_rate_warms_up_linearly_and_ends_as_a_cosine():
    optimizer = default_config().optimizer
    optimizer.update(
        {"learning_rate": 1.0, "initial_learning_rate": 0.0, "final_learning_rate": 0.1, "warmup_epochs": 2}
    )
    rate = learning_rate_schedule(optimizer, batch_size=8, total_steps=100, steps_per_epoch=10)
    # float32 schedules: a few roundings of 6e-8.
    np.testing.assert_allclose([rate(0), rate(10), rate(20)], [0, 0.5, 1], atol=1e-6)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2 for step in (40, 60, 100)]
    np.testing.assert_allclose([rate(40), rate(60), rate(100)], expected, rtol=1e-6)


@pytest.mark.parametrize(("scaled", "ends"), [("peak", 1), ("all", 4)])
def test_rates_grow_with_the_batch(scaled, ends):
    optimizer = default_config().optimizer
    optimizer.update(
        {"learning_rate": 1.0, "initial_learning_rate": 0.1, "final_learning_rate": 0.2, "warmup_epochs": 2}
        | {"reference_batch": 256, "scaled_rates": scaled}
    )
    rate = learning_rate_schedule(optimizer, batch_size=1024, total_steps=100, steps_per_epoch=10)
    np.testing.assert_allclose([rate(0), rate(20), rate(100)], [0.1 * ends, 4, 0.2 * ends], rtol=1e-6)


def test_a_rate_of_zero_is_zero_throughout():
    optimizer = default_config().optimizer
    optimizer.learning_rate, optimizer.warmup_epochs = 0.0, 5.0
    rate = learning_rate_schedule(optimizer, batch_size=8, total_steps=100, steps_per_epoch=10)
    assert [float(rate(step)) for step in (0, 1, 10, 50, 99, 100)] == [0] * 6


def test_warmup_must_leave_some_steps():
    optimizer = default_config().optimizer
    optimizer.warmup_epochs = 5.0
    with pytest.raises(InputError, match=r"warmup_epochs must be below the run's 5 epochs \(50 steps\), not 5.0\."):
        learning_rate_schedule(optimizer, batch_size=8, total_steps=50, steps_per_epoch=10)
    with pytest.raises(InputError, match=r"the run's 4 epochs \(40 steps\), not 5.0\."):
        learning_rate_schedule(optimizer, batch_size=8, total_steps=100, steps_per_epoch=10, earlier_ends=[40])


def test_the_rate_of_an_extended_run_follows_the_schedule_of_the_next_end():
    optimizer = default_config().optimizer
    optimizer.warmup_epochs = 1.0
    common = {"batch_size": 8, "steps_per_epoch": 10}
    rates = {end: learning_rate_schedule(optimizer, total_steps=end, **common) for end in (40, 60, 100)}
    extended = learning_rate_schedule(optimizer, total_steps=100, earlier_ends=[40, 60], **common)
    expected = [rates[40 if step < 40 else 60 if step < 60 else 100](step) for step in range(101)]
    np.testing.assert_array_equal([extended(step) for step in range(101)], expected)
    # float32, compiled as one: some roundings of 6e-8 of the peak, 1e-3.
    np.testing.assert_allclose(jax.jit(jax.vmap(extended))(jnp.arange(101)), np.array(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_the_threshold_of_an_extended_run_never_falls(schedule):
    field = mask(schedule=schedule, begin=0.5, end=1.0)
    whole = {end: mask_threshold_schedule(field, total_steps=end) for end in (40, 60, 100)}
    extended = mask_threshold_schedule(field, total_steps=100, earlier_ends=[40, 60])
    values = [extended(step) for step in range(100)]
    assert values[:40] == [whole[40](step) for step in range(40)]
    assert values == sorted(values)
    assert set(values[40:]) == {0.02 if schedule == "constant" else 1.0}


def test_constant_threshold_stays():
    threshold = mask_threshold_schedule(mask(schedule="constant"), total_steps=10)
    assert {threshold(step) for step in range(10)} == {0.02}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_threshold_goes_from_start_to_exactly_one(schedule):
    threshold = mask_threshold_schedule(mask(schedule=schedule, begin=0.2, end=0.8), total_steps=100)
    values = [threshold(step) for step in range(100)]
    assert values[:20] == [0.02] * 20
    assert values[80:] == [1.0] * 20
    assert values == sorted(values)
    assert values[50] == pytest.approx(0.51)  # halfway both are at the mean of 0.02 and 1
    assert all(value < 1 for value in values[:80])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("begin", [0.2, 1.0])
def test_an_end_of_one_is_the_last_step(schedule, begin):
    threshold = mask_threshold_schedule(mask(schedule=schedule, begin=begin, end=1.0), total_steps=10)
    assert threshold(9) == 1.0
    assert threshold(8) < 1


def test_cosine_starts_slower_than_linear():
    linear, cosine = (mask_threshold_schedule(mask(schedule=name), total_steps=100) for name in ("linear", "cosine"))
    assert cosine(30) < linear(30)
    assert cosine(70) > linear(70)


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_begin_may_be_end(schedule):
    threshold = mask_threshold_schedule(mask(schedule=schedule, begin=0.5, end=0.5), total_steps=10)
    assert threshold(4) == 0.02
    assert threshold(5) == (0.02 if schedule == "constant" else 1.0)
