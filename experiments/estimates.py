"""Means over seeds, and differences paired by seed, with Student's interval."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      mean: mean of the values.
      sd: standard deviation of the values, with n - 1 in the denominator; NaN for one value.
      n: number of values.
    """

    mean: float
    sd: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean, (low, high); NaNs for one value."""
        half = stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * self.sd / math.sqrt(self.n) if self.n > 1 else math.nan
        return self.mean - half, self.mean + half


def estimate(values: Iterable[float]) -> Estimate:
    """The estimate from one value for each seed."""
    array = np.array(list(values))
    return Estimate(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan, len(array))


def paired_difference(arm: dict[int, float], control: dict[int, float]) -> Estimate | None:
    """The mean difference of two arms over the seeds that both have; None if they share no seed."""
    # Paired by seed: both arms then saw the examples in the same order, which removes its share of the spread.
    differences = [arm[seed] - control[seed] for seed in sorted(arm.keys() & control.keys())]
    return estimate(differences) if differences else None
