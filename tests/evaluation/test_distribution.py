import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from spin_diffusion.evaluation.distribution import (
    GROUPS,
    METRICS,
    believable,
    groups_of,
    interval,
    measure,
)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def with_moments(pictures: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Features whose mean and unbiased covariance are exactly these."""
    values = gaussian(pictures, pictures, len(mean))
    values -= values.mean(axis=0)
    white = values @ linalg.inv(linalg.cholesky(np.cov(values.T)))
    return white @ linalg.cholesky(covariance) + mean


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    return measure(x[:, None], y)["fd"].whole


def test_the_frechet_distance_is_the_closed_form_of_two_gaussians() -> None:
    mean, deviations = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 0.2])
    x = with_moments(50, mean, np.diag(deviations**2))
    y = with_moments(70, np.zeros(3), np.eye(3))
    assert frechet_distance(x, y) == pytest.approx((mean**2).sum() + ((deviations - 1) ** 2).sum())

    first, second = (mixed @ mixed.T for mixed in gaussian(0, 2, 3, 3))  # they do not commute
    expected = (mean**2).sum() + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet_distance(with_moments(50, mean, first), with_moments(60, 0 * mean, second)) == pytest.approx(
        expected
    )


def test_features_of_fewer_pictures_than_their_width_have_a_distance_too() -> None:
    x = gaussian(1, 30, 50)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x + 2, x) == pytest.approx(4 * 50)


def by_definition(x: np.ndarray, prompt_of: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The metrics as the papers write them; of the kernel without pairs of one prompt."""
    width = x.shape[1]
    kernel = lambda a, b: (a @ b.T / width + 1) ** 3  # noqa: E731
    apart = prompt_of[:, None] != prompt_of
    others = ~np.eye(len(y), dtype=bool)
    kid = kernel(x, x)[apart].mean() + kernel(y, y)[others].mean() - 2 * kernel(x, y).mean()
    between, near_y = cdist(x, y), np.sort(cdist(y, y), axis=1)
    of_y, of_x, wide_y = near_y[:, 3], np.sort(cdist(x, x), axis=1)[:, 3], near_y[:, 5]  # the 0th is itself
    mean = x.mean(axis=0) - y.mean(axis=0)
    first, second = np.cov(x.T), np.cov(y.T)
    return {
        "fd": mean @ mean + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real),
        "kid": kid,
        "precision": (between <= of_y).any(axis=1).mean(),
        "recall": (between <= of_x[:, None]).any(axis=0).mean(),
        "density": (between <= wide_y).sum() / 5 / len(x),
        "coverage": (between <= wide_y).any(axis=0).mean(),
    }


def test_metrics_and_their_replicates_are_those_of_the_definitions() -> None:
    x, y = gaussian(2, 270, 2, 6) * 0.9 + 0.1, gaussian(3, 530, 6)  # more rows than are in memory at a time
    measured, flat, prompt_of = measure(x, y), x.reshape(-1, 6), np.repeat(np.arange(270), 2)
    expected = by_definition(flat, prompt_of, y)
    for name in METRICS:
        assert measured[name].whole == pytest.approx(expected[name], abs=1e-9), name
    for group in (0, GROUPS - 1):
        kept, kept_y = np.repeat(groups_of(270), 2) != group, groups_of(530) != group
        without_prompts = by_definition(flat[kept], prompt_of[kept], y)
        without_real = by_definition(flat, prompt_of, y[kept_y])
        for name in METRICS:
            assert measured[name].without_prompts[group] == pytest.approx(without_prompts[name], abs=1e-9), name
            assert measured[name].without_real[group] == pytest.approx(without_real[name], abs=1e-9), name


def test_the_bias_of_the_frechet_distance_is_taken_off() -> None:
    biased, corrected = [], []
    for seed in range(8):
        x, y = gaussian(seed, 150, 1, 40), gaussian(100 + seed, 200, 40)
        found = measure(x, y)["fd"]
        biased.append(found.whole)
        corrected.append(interval("fd", found).mean)
    assert np.mean(biased) > 2
    assert abs(np.mean(corrected)) < 0.1 * np.mean(biased)


def test_95_percent_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 100 pictures in 8 dimensions: of the two that have a closed form the value, of the others the difference of
    two models that are the same, paired by what they share."""
    rng, held = np.random.default_rng(0), {name: 0 for name in METRICS}
    repeats, shift = 80, 0.3
    for _ in range(repeats):
        y, shared = rng.normal(size=(100, 8)), rng.normal(size=(100, 8))
        one, other = (0.6 * shared + 0.8 * rng.normal(size=(100, 8)) + shift for _ in range(2))
        found, against = measure(one[:, None], y), measure(other[:, None], y)
        for name in METRICS:
            within, truth = interval(name, found[name], against[name]), 0.0
            if name == "fd":
                within, truth = interval(name, found[name]), 8 * shift**2
            held[name] += within.low <= truth <= within.high
    assert {name: count / repeats >= 0.92 for name, count in held.items()} == dict.fromkeys(METRICS, True)


def test_a_mode_that_is_lost_is_seen_in_recall_and_coverage_alone() -> None:
    """Two modes; the baseline draws both and strays, the model draws one of them, and well."""
    centre = np.zeros(8)
    centre[0] = 6
    side = np.where(np.arange(200) % 2, 1, -1)[:, None]
    y = gaussian(5, 200, 8) + side * centre
    baseline = measure((1.3 * gaussian(6, 200, 8) + side * centre)[:, None], y)
    collapsed = measure((0.8 * gaussian(7, 200, 8) + centre)[:, None], y)
    moved = {name: interval(name, collapsed[name], baseline[name]) for name in METRICS}
    assert moved["precision"].low > 0
    assert moved["recall"].high < 0 and moved["coverage"].high < 0
    assert moved["fd"].low > 0 and moved["kid"].low > 0  # both are distances


def test_kinds_that_take_turns_do_not_bias_the_distance() -> None:
    """Groups by place would be of one kind each, and leaving one out would shift the balance of the kinds."""

    def in_turn(seed: int) -> np.ndarray:
        kinds = np.random.default_rng(seed).integers(0, 2, 200)
        turn = np.argsort(np.where(kinds, np.cumsum(kinds), np.cumsum(1 - kinds)), kind="stable")
        return gaussian(seed, 200, 4) + 6 * kinds[turn][:, None]

    found = [interval("fd", measure(in_turn(seed)[:, None], in_turn(50 + seed))["fd"]) for seed in range(12)]
    assert abs(np.mean([each.mean for each in found])) < 0.2
    assert sum(each.low < 0 < each.high for each in found) >= 11


def test_too_few_pictures_are_told_in_a_sentence() -> None:
    assert believable(100, 1, 100, 30) == (list(METRICS), "")
    some, why = believable(250, 4, 5000, 768)
    assert some == list(METRICS[1:]) and "2304 pictures" in why and "1000 of 250 prompts" in why
    for few in (believable(99, 1, 5000, 8), believable(5000, 1, 99, 8), believable(19, 40, 5000, 8)):
        assert few[0] == [] and few[1]
