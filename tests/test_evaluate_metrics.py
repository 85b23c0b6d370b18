"""The metrics of `tiue evaluate` on sets whose answer is known, and their intervals."""

import numpy as np
import pytest

from tiue_jax.evaluate import estimate, frechet, image_text, kernel_distances, neighbours

RNG = np.random.default_rng


def test_frechet_distance_of_normal_distributions():
    """Two isotropic normals whose means are 3 apart and whose deviations are 1 and 2: 9 + d (2 - 1)^2."""
    x = RNG(0).standard_normal((20_000, 4))
    y = 2 * RNG(1).standard_normal((20_000, 4)) + np.array([3, 0, 0, 0])
    assert frechet.distance(frechet.statistics(x), frechet.statistics(y)) == pytest.approx(13, rel=0.03)


def test_frechet_interval_holds_the_values_of_other_samples():
    reference = frechet.statistics(RNG(0).standard_normal((2000, 6)))
    ours = frechet.estimate(RNG(1).standard_normal((400, 6)) + 0.3, reference)
    others = [frechet.estimate(RNG(seed).standard_normal((400, 6)) + 0.3, reference).value for seed in range(2, 22)]
    inside = sum(ours.low < value < ours.high for value in others)
    print(f"{inside} of 20 other samples lie in {ours.low:.3f} ... {ours.high:.3f}")
    assert inside >= 14


def test_kernel_distances_of_one_distribution_are_about_zero():
    x, y = RNG(0).standard_normal((2, 2000, 8))
    kid = kernel_distances.kid(x, y, subsets=20, subset_size=500)
    assert kid.low < 0 < kid.high
    shifted = kernel_distances.kid(x + 0.5, y, subsets=20, subset_size=500)
    assert shifted.low > kid.high
    assert abs(kernel_distances.cmmd(x, x).value) < 1e-9
    assert kernel_distances.cmmd(x + 0.5, y).low > kernel_distances.cmmd(x, y).high


def test_precision_and_recall_of_half_a_distribution():
    """Generated images cover one of two real clusters, and half of them lie far outside."""
    rng = RNG(0)
    real = np.concatenate([rng.standard_normal((200, 3)), rng.standard_normal((200, 3)) + 50])
    generated = np.concatenate([rng.standard_normal((200, 3)), rng.standard_normal((200, 3)) - 50])
    values = neighbours.precision_recall_density_coverage(generated, real)
    assert values["precision"].value == pytest.approx(0.5, abs=0.05)
    assert values["recall"].value == pytest.approx(0.5, abs=0.05)
    assert values["density"].value == pytest.approx(0.5, abs=0.1)
    assert values["coverage"].value == pytest.approx(0.5, abs=0.05)


def test_chunks_of_rows_do_not_change_distances(monkeypatch):
    x, y = RNG(0).standard_normal((2, 150, 5))
    whole = neighbours.precision_recall_density_coverage(x, y), neighbours.near_copies(x, y)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    assert (neighbours.precision_recall_density_coverage(x, y), neighbours.near_copies(x, y)) == whole


def test_near_copies_are_counted():
    rng = RNG(0)
    real, new = rng.standard_normal((1000, 4)), rng.standard_normal((1000, 4))
    assert neighbours.near_copies(new, real).value < 0.03
    copied = np.concatenate([new[:500], real[:500] + 1e-6])
    assert neighbours.near_copies(copied, real).value == pytest.approx(0.5, abs=0.03)


def test_retrieval_cosines_and_diversity():
    texts = np.eye(4, 6)
    prompts = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    images = texts[prompts] * 2
    images[0] = texts[1]  # one image of the wrong prompt
    assert image_text.retrieval(images, texts, prompts).value == 7 / 8
    assert image_text.cosines(images, texts[prompts]).mean() == pytest.approx(7 / 8)
    assert image_text.diversity(images, prompts).value == pytest.approx(1 / 4)  # the two images of prompt 0 differ


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    values = RNG(0).standard_normal(1000)
    ours = estimate.of_mean(values)
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1000), rel=0.1)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (frechet.statistics, (np.ones((1, 3)),), "at least 2 images, got 1"),
        (kernel_distances.kid, (np.ones((9, 3)), np.ones((2000, 3))), "at least 1000 images on both sides, got 9 and"),
        (neighbours.precision_recall_density_coverage, (np.ones((5, 3)), np.ones((9, 3))), "got 5 generated ones"),
        (neighbours.near_copies, (np.ones((5, 3)), np.ones((1, 3))), "at least 2 reference images, got 1"),
        (image_text.diversity, (np.ones((3, 2)), np.arange(3)), "at least 2 images of a prompt"),
        (image_text.inception_score, (np.ones((9, 2)),), "at least 10 images, got 9"),
        (estimate.of_mean, (np.ones(0),), "n >= 1"),
    ],
)
def test_too_few_images_are_one_line(function, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
