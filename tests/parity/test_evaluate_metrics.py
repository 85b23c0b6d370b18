"""The metrics of `tiue evaluate` against torch-fidelity, clean-fid and prdc on the same features: within 1e-3."""

import numpy as np
import prdc
import pytest
import torch

from tests.parity.reference_metrics import clean_fid, torch_fidelity_module
from tiue_jax.evaluate import frechet, image_text, kernel_distances, neighbours

TOLERANCE = 1e-3
WIDTH = 32


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    """Features of 300 generated and 400 real images, float32, correlated and not centred, as real features are."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    generated = np.abs(rng.standard_normal((300, WIDTH)) @ mix + 0.2)
    real = np.abs(rng.standard_normal((400, WIDTH)) @ mix)
    return generated.astype(np.float32), real.astype(np.float32)


def check(name: str, ours: float, theirs: float) -> None:
    error = abs(ours - theirs) / abs(theirs)
    print(f"{name}: {ours:.6g}, reference {theirs:.6g}, relative difference {error:.1e}")
    assert error < TOLERANCE


def test_frechet_distance(features):
    ours = frechet.estimate(features[0], frechet.statistics(features[1]))
    fid = torch_fidelity_module("metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in features]
    check("FID, torch-fidelity", ours.value, fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID])
    means, covariances = [x.mean(0) for x in features], [np.cov(x, rowvar=False) for x in features]
    theirs = clean_fid().frechet_distance(means[0], covariances[0], means[1], covariances[1])
    check("FID, clean-fid", ours.value, theirs)
    assert ours.low < ours.value < ours.high


def test_frechet_distance_of_fewer_images_than_features(features):
    few = features[0][: WIDTH // 2], features[1]
    ours = frechet.distance(*map(frechet.statistics, few))
    fid = torch_fidelity_module("metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in few]
    check("FID of few images", ours, fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID])


def test_kernel_inception_distance(features):
    ours = kernel_distances.kid(*features, subsets=20, subset_size=100)
    kid = torch_fidelity_module("metric_kid")
    tensors = [torch.from_numpy(x.astype(np.float64)) for x in features]
    theirs = kid.kid_features_to_metric(*tensors, kid_subsets=20, kid_subset_size=100, verbose=False)
    check("KID, torch-fidelity", ours.value, theirs[kid.KEY_METRIC_KID_MEAN])
    x, y = (np.asarray(part[:300], np.float64) for part in features)
    theirs = clean_fid().kernel_distance(x, y, num_subsets=20, max_subset_size=300)
    check("KID of all images, clean-fid", kernel_distances.kid(x, y, subsets=2, subset_size=300).value, theirs)


def test_inception_score():
    logits = np.random.default_rng(0).standard_normal((203, 40)).astype(np.float32) * 3
    isc = torch_fidelity_module("metric_isc")
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits))[isc.KEY_METRIC_ISC_MEAN]
    check("inception score, torch-fidelity", image_text.inception_score(logits).value, theirs)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(features, k):
    ours = neighbours.precision_recall_density_coverage(*features, k=k)
    theirs = prdc.compute_prdc(real_features=features[1], fake_features=features[0], nearest_k=k)
    for name, estimate in ours.items():
        check(f"{name}, prdc, k = {k}", estimate.value, theirs[name])


def test_cmmd(features):
    """Against the formula of the paper (arXiv 2401.09603, equation 4) on whole matrices."""
    x, y = (part / np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True) for part in features)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.exp(-squared / (2 * 10.0**2)).mean()

    theirs = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    check("CMMD", kernel_distances.cmmd(*features).value, theirs)
