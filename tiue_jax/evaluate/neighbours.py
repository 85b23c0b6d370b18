"""Metrics from nearest neighbours: precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

Distances are Euclidean, computed in float64 and in chunks: 30,000 images against 30,000 need less than 4 GB.
"""

from collections.abc import Iterator

import numpy as np

from tiue_jax.evaluate.estimate import Estimate, numbered, of_mean, of_share_without_folds

K = 5  # neighbours that define the neighbourhood of an image
COPY_QUANTILE = 0.01
ROWS = 1024  # of a distance matrix at once
FOLDS = 10  # of the generated images, at most, for the intervals of recall and coverage


def precision_recall_density_coverage(
    features: np.ndarray, reference: np.ndarray, k: int = K, seed: int = 0, prompts: np.ndarray | None = None
) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of features [n d] against a reference [m d].

    The intervals are over the generated images, or over their prompts: int [n].

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
    # Row 0 is of all images. Each further row is of those outside of a fold.
    kept = np.vstack([np.ones(len(x), bool), _outside_of_folds(len(x), prompts, seed)])
    kept = kept[kept.sum(1) > k]
    reach_x, reach_y = _reach(x, k, kept), _reach(y, k)[0]
    inside_real = np.empty(len(x))
    covered = np.zeros((len(kept), len(y)), bool)
    recalled = np.zeros((len(kept), len(y)), bool)
    for rows, squared in _squared_distances(x, y):
        inside = squared < reach_y[None]
        inside_real[rows] = inside.sum(1)
        for i, chosen in enumerate(kept[:, rows]):
            covered[i] |= inside[chosen].any(0)
            recalled[i] |= (squared[chosen] < reach_x[i, rows][chosen, None]).any(0)

    def share(of_real: np.ndarray) -> Estimate:
        whole, *without = of_real.mean(1)
        if len(without) < 2:  # so few images say nothing about the spread
            return Estimate(float(whole), 0.0, 1.0, len(x))
        return of_share_without_folds(float(whole), np.array(without), len(x))

    return {
        "precision": of_mean(inside_real > 0, seed, groups=prompts),
        "recall": share(recalled),
        "density": of_mean(inside_real / k, seed, groups=prompts),
        "coverage": share(covered),
    }


def near_copies(
    features: np.ndarray, reference: np.ndarray, seed: int = 0, prompts: np.ndarray | None = None
) -> Estimate:
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
    limit = np.quantile(_reach(y, 1)[0], COPY_QUANTILE)
    nearest = np.concatenate([squared.min(1) for _, squared in _squared_distances(x, y)])
    return of_mean(nearest < limit, seed, groups=prompts)


def _outside_of_folds(count: int, prompts: np.ndarray | None, seed: int) -> np.ndarray:
    """For each of f folds, the images outside of it: bool [f n]. Images of one prompt are in one fold."""
    group = numbered(prompts, count)
    number = int(group.max()) + 1
    folds = min(FOLDS, number)
    fold = np.random.default_rng(seed).permutation(number) % folds
    return fold[group][None] != np.arange(folds)[:, None]


def _reach(x: np.ndarray, k: int, kept: np.ndarray | None = None) -> np.ndarray:
    """The squared distance from each of x [n d] to its k-th nearest neighbour among the others.

    Args:
        x: features [n d].
        k: at least 1.
        kept: bool [s n], s sets of images that count, each of more than k. None is one set, of all.

    Returns:
        [s n]. What it says about an image that does not count in its set means nothing.
    """
    sets = np.ones((1, len(x)), bool) if kept is None else kept
    reach = np.empty(sets.shape)
    for rows, squared in _squared_distances(x, x):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = 0  # rounding may leave a small number
        for i, chosen in enumerate(sets):
            reach[i, rows] = np.partition(squared[:, chosen], k, axis=1)[:, k]
    return reach


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of rows of x [n d] with their squared distances to y [m d]: [rows m]."""
    norms = np.einsum("nd,nd->n", y, y)
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        part = x[rows]
        squared = np.einsum("nd,nd->n", part, part)[:, None] + norms[None] - 2 * (part @ y.T)
        yield rows, np.maximum(squared, 0)
