"""Metrics from nearest neighbours: precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

Distances are Euclidean, computed in float64 and in chunks: 30,000 images against 30,000 need less than 4 GB.
"""

from collections.abc import Iterator

import numpy as np

from tiue_jax.evaluate.estimate import Estimate, of_mean

K = 5  # neighbours that define the neighbourhood of an image
COPY_QUANTILE = 0.01
ROWS = 1024  # of a distance matrix at once


def precision_recall_density_coverage(
    features: np.ndarray, reference: np.ndarray, k: int = K, seed: int = 0
) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of features [n d] against a reference [m d].

    The neighbourhood of an image reaches to its k-th nearest neighbour among the images of its set.

    - precision: the share of generated images that lie in the neighbourhood of a real one.
    - recall: the share of real images that lie in the neighbourhood of a generated one.
    - density: the mean number of neighbourhoods of real images that hold a generated image, divided by k.
    - coverage: the share of real images whose neighbourhood holds a generated image.

    Raises:
        ValueError: a set has no more than k images.
    """
    for name, x in (("generated", features), ("reference", reference)):
        if len(x) <= k:
            raise ValueError(f"precision and recall with k = {k} need more than {k} images, got {len(x)} {name} ones")
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    inside_real = np.empty(len(x))
    covered = np.zeros(len(y), bool)
    recalled = np.zeros(len(y), bool)
    for rows, squared in _squared_distances(x, y):
        inside = squared < reach_y[None]
        inside_real[rows] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (squared < reach_x[rows, None]).any(0)
    return {
        "precision": of_mean(inside_real > 0, seed),
        "recall": of_mean(recalled, seed),
        "density": of_mean(inside_real / k, seed),
        "coverage": of_mean(covered, seed),
    }


def near_copies(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> Estimate:
    """The share of features [n d] that are near copies of a real image among the reference [m d].

    A near copy is nearer to a real image than almost all real images are to another: its distance is below the 1%
    quantile of the distances from each real image to its nearest neighbour. A value of 0.01 is expected of new real
    images; a much larger one means that training images are repeated.

    Raises:
        ValueError: there are fewer than two real images.
    """
    if len(reference) < 2:
        raise ValueError(f"near copies need at least 2 reference images, got {len(reference)}")
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    limit = np.quantile(_reach(y, 1), COPY_QUANTILE)
    nearest = np.concatenate([squared.min(1) for _, squared in _squared_distances(x, y)])
    return of_mean(nearest < limit, seed)


def _reach(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance from each of x [n d] to its k-th nearest neighbour among the others: [n]."""
    reach = np.empty(len(x))
    for rows, squared in _squared_distances(x, x):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = 0  # rounding may leave a small number
        reach[rows] = np.partition(squared, k, axis=1)[:, k]
    return reach


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of rows of x [n d] with their squared distances to y [m d]: [rows m]."""
    norms = np.einsum("nd,nd->n", y, y)
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        part = x[rows]
        squared = np.einsum("nd,nd->n", part, part)[:, None] + norms[None] - 2 * (part @ y.T)
        yield rows, np.maximum(squared, 0)
