import itertools
import time
import warnings

import numpy as np
import pytest

from spin_diffusion.evaluation.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_difference,
    sign_test_p,
    win_tie_loss,
)


def test_the_mean_is_exact_and_the_interval_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = mean_interval(values)
    half_width = 1.96 * values.std() / np.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03 * half_width)


def test_two_prompts_resample_to_the_three_means_there_are() -> None:
    # Resampled means are 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4.
    assert mean_interval(np.array([0.0, 1.0])) == Interval(0.5, 0.0, 1.0)
    assert mean_interval(np.array([0.0, 1.0]), confidence=0.4) == Interval(0.5, 0.5, 0.5)


def test_the_bootstrap_agrees_with_enumeration_of_every_resample() -> None:
    values = np.array([0.0, 1.0, 3.0, 7.0, 8.0])
    means = np.array([np.mean(sample) for sample in itertools.product(values, repeat=5)])
    interval = mean_interval(values, confidence=0.9, resamples=40_000)
    assert interval.low == pytest.approx(np.quantile(means, 0.05), abs=0.21)  # one step between neighbouring means
    assert interval.high == pytest.approx(np.quantile(means, 0.95), abs=0.21)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent_of_simulated_sets(draw: str) -> None:
    rng = np.random.default_rng(1)
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    # 1500 sets: the standard error of the coverage is 0.6 %, so that the limits are some 3 of them away.
    sets = getattr(rng, draw)(size=(1500, 200))
    intervals = [mean_interval(values, resamples=500, seed=i) for i, values in enumerate(sets)]
    assert 0.93 <= np.mean([interval.low <= truth <= interval.high for interval in intervals]) <= 0.97


def test_images_of_a_prompt_are_averaged_first() -> None:
    rng = np.random.default_rng(2)
    per_prompt = rng.normal(size=60)
    copies = np.repeat(per_prompt[:, None], 50, axis=1)
    few, many = mean_interval(per_prompt), mean_interval(copies)
    assert (few.low, few.high) == pytest.approx((many.low, many.high)), "copies of images are no evidence"
    noisy = rng.normal(size=(30, 4))
    assert mean_interval(noisy) == mean_interval(noisy.mean(axis=1))


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_so() -> None:
    values = np.random.default_rng(3).normal(size=100)
    first = mean_interval(values, seed=5)
    assert first == mean_interval(values, seed=5) != mean_interval(values, seed=6)
    # Standard error of a 2.5 % quantile of 10,000 normal draws: 0.027 of their deviation (here 0.1); 5 of them, twice.
    assert first.low == pytest.approx(mean_interval(values, seed=6).low, abs=5 * 2**0.5 * 0.0027)


def test_intervals_are_independent_of_the_scale_of_the_scores() -> None:
    values = np.random.default_rng(4).normal(size=50)
    unit, large = mean_interval(values), mean_interval(1e150 * values)
    assert (large.low, large.high) == pytest.approx((1e150 * unit.low, 1e150 * unit.high))


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(5)
    prompt_difficulty = rng.normal(0, 10, (200, 1))
    b = prompt_difficulty + rng.normal(0, 0.1, (200, 2))
    a = prompt_difficulty + 0.3 + rng.normal(0, 0.1, (200, 2))
    difference = paired_difference(a, b)
    assert 0.27 < difference.low < difference.mean < difference.high < 0.33
    unpaired = mean_interval(a)
    assert unpaired.high - unpaired.low > 2


def test_the_difference_is_a_minus_b_and_changes_sign_with_the_sides() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(1, 1, 50), rng.normal(0, 1, 50)
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward.mean == pytest.approx(a.mean() - b.mean()) and forward.low > 0
    assert (backward.mean, backward.low, backward.high) == pytest.approx(
        (-forward.mean, -forward.high, -forward.low), abs=0.02
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3e-9, 1e300])
def test_equal_values_give_an_interval_of_zero_width_without_a_warning(constant: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval(np.full(7, constant)) == Interval(constant, constant, constant)
        assert paired_difference(np.full((7, 3), constant), np.full((7, 3), constant)) == Interval(0.0, 0.0, 0.0)


def test_integer_scores_are_accepted() -> None:
    assert mean_interval(np.array([1, 2, 3])).mean == 2.0


def test_wins_ties_and_losses_are_counted_by_prompt() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 3.4, 5.0])
    assert win_tie_loss(a, b) == (1, 1, 2)
    assert win_tie_loss(b, a) == (2, 1, 1)
    assert win_tie_loss(a, b, tolerance=0.5) == (1, 2, 1)
    assert win_tie_loss(a, b, tolerance=1.0) == (0, 4, 0)
    two_images = np.array([[0.0, 10.0], [1.0, 1.0]])
    assert win_tie_loss(two_images, np.array([[4.0, 4.0], [1.0, 1.0]])) == (1, 1, 0)


@pytest.mark.parametrize("trials", range(1, 11))
def test_the_sign_test_agrees_with_enumeration_of_all_outcomes(trials: int) -> None:
    outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=trials)]
    for wins in range(trials + 1):
        extreme = sum(abs(2 * outcome - trials) >= abs(2 * wins - trials) for outcome in outcomes)
        assert sign_test_p(wins, trials - wins) == pytest.approx(extreme / 2**trials)


def test_the_sign_test_without_a_decision_says_nothing() -> None:
    assert sign_test_p(0, 0) == 1.0
    assert sign_test_p(5, 0) == pytest.approx(2 / 32)


def test_holm_matches_the_worked_example_and_keeps_the_order() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.2]), [0.2])
    assert holm([]).shape == (0,)


def test_holm_keeps_the_chance_of_any_false_alarm_below_5_percent() -> None:
    p = np.random.default_rng(7).uniform(size=(4000, 6))
    alarms = np.mean([(holm(row) < 0.05).any() for row in p])
    assert 0.035 < alarms < 0.06 and (p < 0.05).any(axis=1).mean() > 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1.0, np.nan]), "finite.*prompt number 1"),
        (np.array([[1.0, 2.0], [np.inf, 1.0]]), "finite.*prompt number 1"),
        (np.array([1.0]), "at least 2 prompts"),
        (np.array([]), "at least 2 prompts"),
        (np.array(1.0), "shape"),
        (np.zeros((2, 0)), "shape"),
        (np.zeros((2, 2, 2)), "shape"),
    ],
)
def test_unusable_values_are_refused_in_one_line(values: np.ndarray, message: str) -> None:
    for call in (mean_interval, lambda v: paired_difference(v, v), lambda v: win_tie_loss(v, v)):
        with pytest.raises(ValueError, match=message) as caught:
            call(values)
        assert "\n" not in str(caught.value)


def test_other_unusable_arguments_are_refused() -> None:
    two, three = np.zeros(2), np.zeros(3)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_difference(two, three)
    with pytest.raises(ValueError, match="same prompts and images"):
        win_tie_loss(np.zeros((3, 1)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="tolerance"):
        win_tie_loss(two, two, tolerance=-1.0)
    with pytest.raises(ValueError, match="tolerance"):
        win_tie_loss(two, two, tolerance=float("nan"))
    with pytest.raises(ValueError, match="confidence"):
        mean_interval(two, confidence=95.0)
    with pytest.raises(ValueError, match="resamples"):
        mean_interval(two, resamples=0)
    with pytest.raises(ValueError, match="negative"):
        sign_test_p(-1, 3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.5, 1.5])
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.5, float("nan")])


def test_10000_resamples_of_200_prompts_take_well_under_a_second() -> None:
    values = np.random.default_rng(8).normal(size=(200, 5))
    start = time.process_time()
    mean_interval(values)
    assert time.process_time() - start < 1
