"""The Fréchet distance of two sets of features, as normal distributions: FID (arXiv 1706.08500), FD-DINOv2.

All in float64, on the CPU.
"""

from typing import NamedTuple

import numpy as np

from tiue_jax.evaluate.estimate import Estimate, draw_counts, numbered, of_replicates

RESAMPLES = 20


class Statistics(NamedTuple):
    """The mean [d] and the covariance [d d] of features, float64, and the number of images."""

    mean: np.ndarray
    covariance: np.ndarray
    images: int


def statistics(features: np.ndarray) -> Statistics:
    """The mean and the unbiased covariance of features [n d].

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
    return _weighted(np.asarray(features, np.float64), np.ones(len(features)))


def _weighted(features: np.ndarray, counts: np.ndarray) -> Statistics:
    """The statistics of float64 features [n d], of which row i occurs counts[i] times."""
    total = counts.sum()
    mean = counts @ features / total
    centred = (features - mean) * np.sqrt(counts)[:, None]
    return Statistics(mean, centred.T @ centred / (total - 1), int(total))


def distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500, equation 6)."""
    return _distance(_root(a), a, b)


def estimate(features: np.ndarray, reference: Statistics, seed: int = 0, prompts: np.ndarray | None = None) -> Estimate:
    """The Fréchet distance of features [n d] from a reference, with the spread over resamples of the features.

    The reference is held fixed: it is the same for all models that are compared. Whole prompts are drawn: int [n].
    """
    features = np.asarray(features, np.float64)
    root = _root(reference)
    value = _distance(root, reference, statistics(features))
    rng = np.random.default_rng(seed)
    group = numbered(prompts, len(features))
    replicates = []
    for _ in range(RESAMPLES):
        counts = draw_counts(rng, group).astype(np.float64)
        replicates.append(_distance(root, reference, _weighted(features, counts)))
    return of_replicates(value, np.array(replicates), len(features))


def images_needed(width: int) -> int:
    """The number of images below which the covariance of features of this width is singular."""
    return width + 1


def _root(a: Statistics) -> np.ndarray:
    """The symmetric square root of a covariance: [d d]."""
    values, vectors = np.linalg.eigh(a.covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _distance(root: np.ndarray, a: Statistics, b: Statistics) -> float:
    """`distance`, with the square root of the covariance of `a`.

    tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    """
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace)
