import types

import pytest
from jax.experimental.pallas import tpu as pltpu

from castling_jax.training import throughput
from castling_jax.training.throughput import Meter, peak_flops


@pytest.fixture
def clock(monkeypatch):
    """The meter's clock, a number of seconds that a test sets."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 4)
    return now


def test_figures_since_the_last_reading(clock):
    meter = Meter(batch_size=32, step=10, total_steps=100, peak=1e6)
    for _ in range(5):
        with meter.waiting():
            clock.seconds += 0.5
        clock.seconds += 1.5
    figures = meter.read(15, macs=1000)
    # Five steps in ten seconds, of which 2.5 waiting; 85 steps are left. 4 images a second and chip, 6,000 operations
    # each.
    assert figures == {
        "images_per_second": 16,
        "images_per_second_per_chip": 4,
        "data_wait_share": 0.25,
        "eta_seconds": 170,
        "mfu": pytest.approx(4 * 6000 / 1e6),
    }
    clock.seconds += 1
    with meter.paused():
        clock.seconds += 100
    figures = meter.read(17, macs=1000)
    assert (figures["images_per_second"], figures["data_wait_share"]) == (64, 0)


def test_without_a_known_peak_there_is_no_mfu(clock):
    meter = Meter(batch_size=32, step=0, total_steps=100, peak=peak_flops())
    clock.seconds += 1
    assert peak_flops() is None  # of a CPU
    assert "mfu" not in meter.read(1, macs=1000)


def test_peak_is_a_chips(monkeypatch):
    # A TPU v4 device is both cores of a chip: 275 teraflops (cloud.google.com/tpu/docs/v4).
    info = types.SimpleNamespace(bf16_ops_per_second=137.5e12, num_cores=2)
    monkeypatch.setattr(throughput.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    assert peak_flops() == 275e12
