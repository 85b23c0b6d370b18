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


def test_images_of_one_prompt_are_drawn_together():
    """Prompts of four images that are alike: the interval is that of the prompts, twice as wide as of the images."""
    of_prompts = RNG(0).standard_normal(300)
    prompts = np.arange(300).repeat(4)
    grouped = estimate.of_mean(of_prompts.repeat(4), groups=prompts)
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * of_prompts.std() / np.sqrt(300), rel=0.1)
    single = estimate.of_mean(of_prompts.repeat(4))
    assert grouped.high - grouped.low == pytest.approx(2 * (single.high - single.low), rel=0.1)


def test_a_share_of_none_or_all_has_an_interval():
    none, every = estimate.of_mean(np.zeros(512, bool)), estimate.of_mean(np.ones(512, bool))
    assert (none.low, every.high) == (0, 1)
    assert none.high == pytest.approx(1 - every.low) == pytest.approx(0.0074, abs=1e-4)
    in_prompts = estimate.of_mean(np.zeros(512, bool), groups=np.arange(128).repeat(4))
    assert in_prompts.high == pytest.approx(4 * none.high, rel=0.05)


@pytest.mark.parametrize(("per_prompt", "alike"), [(1, 0.0), (4, 0.8)])
def test_the_intervals_of_recall_and_coverage_hold_the_spread_of_other_images(per_prompt, alike):
    """The mean width of the intervals against the deviation of 40 sets of new images."""
    real, prompts = RNG(0).standard_normal((800, 6)), np.arange(160) // per_prompt
    found = []
    for seed in range(1, 41):
        rng = RNG(seed)
        of_images, of_prompts = rng.standard_normal((2, 160, 6))
        x = np.sqrt(1 - alike**2) * of_images + alike * of_prompts[prompts]
        found.append(neighbours.precision_recall_density_coverage(x, real, prompts=prompts))
    for name in ("precision", "recall", "density", "coverage"):
        values = np.array([one[name].value for one in found])
        widths = [(one[name].high - one[name].low) / 2 / 1.96 for one in found]
        print(f"{name}: deviation {values.std(ddof=1):.4f}, by the intervals {np.mean(widths):.4f}")
        assert 0.7 < np.mean(widths) / values.std(ddof=1) < 1.7  # the jackknife of so few images is too wide


@pytest.mark.parametrize(("per_prompt", "alike"), [(1, 0.0), (4, 0.8)])
def test_the_intervals_of_distances_hold_the_spread_of_other_images(per_prompt, alike):
    """The mean width of the intervals against the deviation of 40 sets of new images, away from the distance 0."""
    real, prompts = RNG(0).standard_normal((1000, 6)), np.arange(240) // per_prompt
    reference, found = frechet.statistics(real), []
    for seed in range(1, 41):
        of_images, of_prompts = RNG(seed).standard_normal((2, 240, 6))
        x = np.sqrt(1 - alike**2) * of_images + alike * of_prompts[prompts] + 0.5
        found.append(
            {
                "Fréchet distance": frechet.estimate(x, reference, prompts=prompts),
                "KID": kernel_distances.kid(x, real, subsets=100, subset_size=80, prompts=prompts),
                "CMMD": kernel_distances.cmmd(x, real, prompts=prompts),
            }
        )
    for name in found[0]:
        deviation = np.std([one[name].value for one in found], ddof=1)
        widths = np.mean([(one[name].high - one[name].low) / 2 / 1.96 for one in found])
        print(f"{name}: deviation {deviation:.4g}, by the intervals {widths:.4g}")
        assert 0.7 < widths / deviation < 1.5


def test_so_few_images_say_nothing_about_the_spread():
    x = RNG(0).standard_normal((64, 3))
    few = neighbours.precision_recall_density_coverage(x[:6], x)
    assert (few["recall"].low, few["recall"].high) == (0, 1)
    one_prompt = neighbours.precision_recall_density_coverage(x[:32], x[32:], prompts=np.zeros(32, int))
    assert one_prompt == neighbours.precision_recall_density_coverage(x[:32], x[32:])  # its images are drawn
    assert kernel_distances.kid(x[:32], x[32:], subset_size=32).high == np.inf


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
