"""How fast a run goes, and how much of the chips it uses."""

import contextlib
import time
from collections.abc import Iterator

import jax
from jax.experimental.pallas import tpu as pltpu

# A step is the forward pass and twice as much backward, and a multiply-accumulate two operations; what
# rematerialisation computes again does not count (Chowdhery et al., PaLM, appendix B).
FLOPS_PER_MAC = 2 * 3


def peak_flops() -> float | None:
    """bfloat16 operations a second of one device; None where JAX does not know them, as of a CPU."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return None
    return info.bf16_ops_per_second * info.num_cores


class Meter:
    """Measures the loop between two readings.

    Args:
      batch_size: of all devices together.
      step: that the loop starts from.
      total_steps: where it will end.
      peak: of one device, as `peak_flops` gives it.
    """

    def __init__(self, *, batch_size: int, step: int, total_steps: int, peak: float | None):
        self._batch_size, self._total_steps, self._peak = batch_size, total_steps, peak
        self._step, self._since = step, time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, and is not to count."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self, step: int, *, macs: int) -> dict[str, float]:
        """The figures since the last reading.

        Args:
          step: where the loop is; what it has computed must have been waited for.
          macs: of the forward pass of one image, now.

        Returns:
          images_per_second, images_per_second_per_chip; mfu, the model's operations as a share of the chips' peak,
          where that is known; data_wait_share, of the time, in part of which earlier steps may still have been
          computed; eta_seconds, to the end at this speed.
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
