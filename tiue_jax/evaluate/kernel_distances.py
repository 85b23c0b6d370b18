"""Kernel distances of two sets of features: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603). All in float64."""

import numpy as np

from tiue_jax.evaluate.estimate import Estimate, draw_counts, numbered, of_replicates
from tiue_jax.evaluate.image_text import unit

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as torch-fidelity
SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as its authors' code
RESAMPLES = 100
_ROWS = 2048  # of a kernel matrix at once


def kid(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
    prompts: np.ndarray | None = None,
) -> Estimate:
    """The kernel Inception distance of features [n d] from a reference [m d]: the mean over subsets.

    The kernel is (x y / d + 1)^3, and the estimate of each subset is unbiased. Subsets are drawn as torch-fidelity
    draws them. For the interval, others are drawn, of whole prompts (int [n]) and with a fixed part of the reference.
    It has no limits if a subset is all of the images.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    smaller = min(len(features), len(reference))
    if smaller < subset_size:
        raise ValueError(
            f"KID needs at least {subset_size} images on both sides, got {len(features)} and {len(reference)}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        values.append(_unbiased(_cubic(x, x), _cubic(x, y), _cubic(y, y)))
    value, n = float(np.mean(values)), len(features)
    if n == subset_size:
        return Estimate(value, -np.inf, np.inf, n)
    group, draws = numbered(prompts, n), np.random.default_rng(seed)
    y = reference[draws.choice(len(reference), subset_size, replace=False)].astype(np.float64)
    within = _cubic(y, y)
    replicates = []
    for _ in range(subsets):
        # The prompts in a random order; the last of them may be cut.
        order = np.argsort(draws.permutation(int(group.max()) + 1)[group], kind="stable")
        x = features[order[:subset_size]].astype(np.float64)
        replicates.append(_unbiased(_cubic(x, x), _cubic(x, y), within))
    # Subsets have no image twice, so that their deviation is smaller than that of independent sets of their size.
    return of_replicates(value, np.array(replicates), n, np.sqrt(subset_size / (n - subset_size)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel of all pairs of x [n d] and y [m d]: [n m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _unbiased(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy from kernel matrices [n n], [n n], [n n]."""
    n = len(xx)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def cmmd(features: np.ndarray, reference: np.ndarray, seed: int = 0, prompts: np.ndarray | None = None) -> Estimate:
    """The CLIP maximum mean discrepancy of features [n d] from a reference [m d], times 1000.

    Features are divided by their norm. The kernel is exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10, and the estimate is
    the one with the diagonal, as in the authors' code. For the interval, whole prompts (int [n]) are drawn; the
    reference is fixed.
    """
    x, y = unit(features), unit(reference)
    n = len(x)
    rng = np.random.default_rng(seed)
    group = numbered(prompts, n)
    counts = np.stack([np.ones(n, int), *(draw_counts(rng, group) for _ in range(RESAMPLES))])  # [1+r n]
    weights = counts / counts.sum(1, keepdims=True)
    within = _quadratic(x, x, weights)
    between = _gaussian_mean(x, y, weights)
    reference_within = _gaussian_mean(y, y, np.full((1, len(y)), 1 / len(y)))
    values = SCALE * (within + reference_within - 2 * between)
    return of_replicates(values[0], values[1:], n)


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CMMD's kernel of all pairs of unit vectors x [n d] and y [m d]: [n m]."""
    return np.exp(-(2 - 2 * (x @ y.T)) / (2 * SIGMA**2))


def _gaussian_mean(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over y [m d] of the kernel, summed over x [n d] with weights [r n]: [r]. Row by row in chunks."""
    total = np.zeros(len(weights))
    for start in range(0, len(x), _ROWS):
        rows = _gaussian(x[start : start + _ROWS], y).mean(1)
        total += weights[:, start : start + _ROWS] @ rows
    return total


def _quadratic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The kernel of x [n d] and y [n d], summed over both with the same weights [r n]: [r]."""
    total = np.zeros(len(weights))
    for start in range(0, len(x), _ROWS):
        part = _gaussian(x[start : start + _ROWS], y) @ weights.T  # [rows r]
        total += np.einsum("rn,nr->r", weights[:, start : start + _ROWS], part)
    return total
