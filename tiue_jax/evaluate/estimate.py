"""A number with its spread: 95% intervals from the bootstrap (Efron 1979). A metric is never printed without one."""

import dataclasses
from typing import Any, Self

import numpy as np

RESAMPLES = 1000
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution
_CHUNK = 2**22  # counts that are drawn at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric and its 95% interval.

    Attributes:
        value: the metric of the whole sample.
        low: lower end of the interval.
        high: upper end of the interval.
        count: the number of images, pairs or prompts that it is a statistic of.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Self:
        """Reads an entry of `results.json`."""
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """The entry of `results.json`."""
        return dataclasses.asdict(self)


def of_mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """Estimates the mean of independent values [n], with the percentiles of bootstrapped means.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"a mean needs values [n], n >= 1, got {list(values.shape)}")
    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, _CHUNK // n)
    means = [
        values[rng.integers(0, n, (min(rows, RESAMPLES - start), n))].mean(1) for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)


def of_replicates(value: float, replicates: np.ndarray, count: int, factor: float = 1.0) -> Estimate:
    """Estimates a metric from its values on resamples: `value` plus and minus 1.96 standard deviations.

    Percentiles would be wrong for distances between distributions: a resample repeats images, which makes every such
    distance larger. The deviation of the resamples does not have this bias.

    Args:
        value: on the whole sample.
        replicates: float [r], r >= 2, on resamples.
        count: the number of images.
        factor: of the deviation, if the resamples have another size than the sample: sqrt(size / count).
    """
    half = _Z * factor * float(np.std(replicates, ddof=1))
    return Estimate(float(value), float(value) - half, float(value) + half, count)
