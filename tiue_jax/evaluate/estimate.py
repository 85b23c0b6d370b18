"""A number with its spread: 95% intervals from the bootstrap (Efron 1979). A metric is never printed without one."""

import dataclasses
from typing import Any

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

    def to_dict(self) -> dict[str, Any]:
        """The entry of `results.json`."""
        return dataclasses.asdict(self)


def of_mean(values: np.ndarray, seed: int = 0, *, groups: np.ndarray | None = None) -> Estimate:
    """Estimates the mean of values [n], with the percentiles of bootstrapped means.

    Of bool values it is a share. A resample of a share of 0 or 1 is the same again, so there the end is Wilson's.

    Args:
        values: float or bool [n].
        seed: of the bootstrap.
        groups: int [n]. Values of a group, such as images of one prompt, depend on each other, so whole groups are
            drawn. None, or one group only: all values are independent.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"a mean needs values [n], n >= 1, got {list(values.shape)}")
    group = numbered(groups, len(values))
    sums, sizes = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(seed)
    n = len(sums)
    rows = max(1, _CHUNK // n)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, n, (min(rows, RESAMPLES - start), n))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    mean = float(values.mean())
    if values.dtype == bool and mean == 0:
        high = _Z**2 / (n + _Z**2)
    if values.dtype == bool and mean == 1:
        low = n / (n + _Z**2)
    return Estimate(mean, float(low), float(high), len(values))


def numbered(groups: np.ndarray | None, count: int) -> np.ndarray:
    """The number of the group of each of `count` values, from 0 on: int [n]. See the groups of `of_mean`."""
    number = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    return number if number.max() > 0 else np.arange(count)


def draw_counts(rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """How often each value occurs in a resample of whole groups: int [n]. `group` comes from `numbered`."""
    number = int(group.max()) + 1
    return np.bincount(rng.integers(0, number, number), minlength=number)[group]


def of_share_without_folds(value: float, shares: np.ndarray, count: int) -> Estimate:
    """Estimates a share from its values without one fold of the images each: the jackknife (Efron and Stein 1981).

    Args:
        value: on all images, 0 to 1.
        shares: float [f], f >= 2, without each of f folds.
        count: the number of images.
    """
    f = len(shares)
    half = _Z * float(np.sqrt((f - 1) / f * np.sum((shares - shares.mean()) ** 2)))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), count)


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
