"""Measures a run's speed, and its share of the chips' peak."""

import contextlib
import time
from collections.abc import Iterator

import jax

# A step is the forward pass and a backward pass of twice its cost; a multiply-accumulate is two operations. Operations
# that rematerialisation repeats do not count (Chowdhery et al., PaLM, appendix B).
FLOPS_PER_MAC = 2 * 3


def peak_flops() -> float | None:
    """One device's peak in bfloat16 operations a second; None if JAX does not know it, as for a CPU."""
    if jax.default_backend() != "tpu":
        return None
    from jax.experimental.pallas import tpu as pltpu  # here, because importing Pallas takes a while

    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return None
    return info.bf16_ops_per_second * info.num_cores


class Meter:
    """Measures the loop between two readings.

    Args:
      batch_size: images in a step, over all devices.
      step: the step that the loop starts from.
      total_steps: the step that it will end at.
      peak: one device's operations a second, from `peak_flops`; None if unknown.
    """

    def __init__(self, *, batch_size: int, step: int, total_steps: int, peak: float | None):
        self._batch_size, self._total_steps, self._peak = batch_size, total_steps, peak
        self._step, self._since = step, time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out of the measurement, because it is not training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start  # as if the block had taken no time

    def read(self, step: int, *, macs: int) -> dict[str, float]:
        """The figures since the last reading.

        Args:
          step: the loop's step, whose results must be computed.
          macs: multiply-accumulates of one image's forward pass at this step.

        Returns:
          images_per_second; images_per_second_per_chip; mfu, the model's operations as a share of the chips' peak, if
          that is known; data_wait_share, the share of the time that the loop waited for data (the devices may have been
          computing earlier steps meanwhile); eta_seconds, the time to the end at this speed.
        """
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._step
        images_per_second = steps * self._batch_size / seconds
        per_chip = images_per_second / jax.device_count()
        figures = {
            "images_per_second": images_per_second,
            "images_per_second_per_chip": per_chip,
            "data_wait_share": self._waited / seconds,
            "eta_seconds": (self._total_steps - step) * seconds / steps,
        }
        if self._peak is not None:
            figures["mfu"] = per_chip * FLOPS_PER_MAC * macs / self._peak
        self._step, self._since, self._waited = step, now, 0.0
        return figures
