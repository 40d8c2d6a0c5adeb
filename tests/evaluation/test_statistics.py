import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from spin_diffusion.evaluation.records import IMAGES, Role
from spin_diffusion.evaluation.statistics import (
    Interval,
    best_by_average,
    best_of_k,
    half_width,
    holm,
    mean_interval,
    paired_difference,
    sign_test_p,
    t_test_p,
    win_rate,
    win_tie_loss,
)
from spin_diffusion.evaluation.verdicts import overall_verdict, verdict


def test_the_interval_is_scipys_t_interval() -> None:
    for size in (2, 5, 400):
        values = np.random.default_rng(size).normal(3.0, 2.0, size)
        interval = mean_interval(values, 0.9)
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
        assert interval.mean == pytest.approx(values.mean())
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


_DISTRIBUTIONS = {
    # name -> (draws of a shape, their true mean, the least coverage at 5, 10 and 20 prompts that the docstring claims)
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0, (0.95, 0.95, 0.95)),
    "t with 3 degrees of freedom": (lambda rng, shape: rng.standard_t(3, size=shape), 0.0, (0.95, 0.95, 0.95)),
    "rounded, many ties": (lambda rng, shape: np.round(rng.normal(size=shape) * 0.6), 0.0, (0.95, 0.95, 0.95)),
    "rounded, shifted": (lambda rng, shape: np.round(rng.normal(size=shape) * 0.6 + 0.3), None, (0.93, 0.95, 0.94)),
    "7 wins of 10": (lambda rng, shape: np.where(rng.random(shape) < 0.7, 1.0, -1.0), 0.4, (0.95, 0.95, 0.94)),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0, (0.88, 0.90, 0.92)),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), np.exp(0.5), (0.82, 0.83, 0.87)),
}  # fmt: skip


@pytest.mark.parametrize("name", _DISTRIBUTIONS)
def test_95_percent_intervals_of_few_prompts_cover_the_truth_as_often_as_is_said(name: str) -> None:
    draw, truth, claimed = _DISTRIBUTIONS[name]
    rng = np.random.default_rng(1)
    truth = draw(rng, 4_000_000).mean() if truth is None else truth
    for num_prompts, least in zip((5, 10, 20), claimed, strict=True):
        sets = draw(rng, (20_000, num_prompts))  # the standard error of the coverage is 0.15 to 0.3 %
        tied = np.ptp(sets, axis=1) == 0
        width = half_width(sets, 0.95)
        low, high = sets.mean(axis=1) - width, sets.mean(axis=1) + width
        for place in np.flatnonzero(tied):
            interval = mean_interval(sets[place])
            low[place], high[place] = interval.low, interval.high
        assert ((low <= truth) & (truth <= high)).mean() >= least - 0.01, num_prompts
        one = mean_interval(sets[~tied][0])
        assert (one.low, one.high) == pytest.approx((low[~tied][0], high[~tied][0])), "what is counted is what is used"


@pytest.mark.parametrize("name", ["normal", "exponential", "rounded, many ties"])
def test_95_percent_intervals_of_200_prompts_cover_the_truth_in_93_to_97_percent(name: str) -> None:
    draw, truth, _ = _DISTRIBUTIONS[name]
    intervals = [mean_interval(values) for values in draw(np.random.default_rng(1), (1000, 200))]
    assert 0.93 <= np.mean([interval.low <= truth <= interval.high for interval in intervals]) <= 0.97


def test_equal_differences_are_beyond_chance_only_where_the_sign_test_says_so_too() -> None:
    for size in range(2, 12):
        for sign in (1.0, -1.0):
            interval = mean_interval(np.full(size, 0.3 * sign))
            excludes_0 = interval.low > 0 or interval.high < 0
            assert excludes_0 == (sign_test_p(size, 0) < 0.05) == (size >= 6)
            assert interval.mean == 0.3 * sign in (interval.low, interval.high)
    # A difference that is the same but for rounding: of scores in fp32, and of those in fp64
    scores = np.random.default_rng(0).normal(21, 1, 5)
    for dtype in (np.float32, np.float64):
        base = scores.astype(dtype)
        interval = paired_difference((base + dtype(0.1)).astype(np.float64), base.astype(np.float64))
        assert interval.low < 0 < interval.high == pytest.approx(0.1, rel=1e-4)
        wobble = paired_difference(base.astype(np.float64) * (1 + 1e-8), base.astype(np.float64))
        assert wobble == Interval(0.0, 0.0, 0.0)
    # Pictures that are the same but for their batch tie, whatever the others do
    noisy = scores + np.array([1e-7, -1e-7, 1e-7, 0.5, -0.5])
    assert win_tie_loss(noisy, scores) == (1, 3, 1)


def test_images_of_a_prompt_are_averaged_first() -> None:
    rng = np.random.default_rng(2)
    per_prompt = rng.normal(size=60)
    copies = np.repeat(per_prompt[:, None], 50, axis=1)
    few, many = mean_interval(per_prompt), mean_interval(copies)
    assert (few.low, few.high) == pytest.approx((many.low, many.high)), "copies of images are no evidence"
    noisy = rng.normal(size=(30, 4))
    assert mean_interval(noisy) == mean_interval(noisy.mean(axis=1))


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
def test_equal_values_give_no_warning_and_an_interval_that_ends_at_them(constant: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = mean_interval(np.full(7, constant))
        assert interval.mean == constant and constant in (interval.low, interval.high)
        assert abs(interval.high - interval.low) == pytest.approx(abs(2 * constant) * (1 - 0.025 ** (1 / 7)))
        assert paired_difference(np.full((7, 3), constant), np.full((7, 3), constant)) == Interval(0.0, 0.0, 0.0)


def test_integer_scores_are_accepted() -> None:
    assert mean_interval(np.array([1, 2, 3])).mean == 2.0


def test_wins_ties_and_losses_are_counted_by_prompt() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 3.4, 5.0])
    assert win_tie_loss(a, b) == (1, 1, 2)
    assert win_tie_loss(b, a) == (2, 1, 1)
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


def test_the_p_of_the_t_test_is_where_the_interval_meets_0() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, (15, 3)), rng.normal(size=(15, 3))
    p = t_test_p(a, b)
    assert p == pytest.approx(stats.ttest_rel(a.mean(axis=1), b.mean(axis=1)).pvalue)
    met = paired_difference(a, b, 1 - p)
    assert min(abs(met.low), abs(met.high)) == pytest.approx(0, abs=1e-9)
    # Equal differences: what the sign test says
    for size in (5, 6):
        assert t_test_p(np.full(size, 0.3), np.zeros(size)) == sign_test_p(size, 0)
    assert t_test_p(a, a) == 1.0


def test_scorers_whose_differences_are_skewed_seldom_call_a_model_better_or_worse_that_is_neither() -> None:
    """Mean 0, median not: the sign test rejects, and intervals miss the mean more often than they say.

    With a t-test that is not adjusted it would be one evaluation in nine.
    """
    names = ["pickscore", "hps", "imagereward", "clip", "beauty"]
    called = 0
    for seed in range(300):
        differences = np.random.default_rng(seed).exponential(size=(5, 100)) - 1
        zero = np.zeros(100)
        counts = [win_tie_loss(of_scorer, zero) for of_scorer in differences]
        p = holm([max(sign_test_p(c[0], c[2]), t_test_p(d, zero)) for c, d in zip(counts, differences, strict=True)])
        verdicts = {
            name: verdict(paired_difference(d, zero), float(p[i]), counts[i][0] - counts[i][2], False)
            for i, (name, d) in enumerate(zip(names, differences, strict=True))
        }
        called += overall_verdict(verdicts, ROLES, {})[0] != "inconclusive"
    assert called <= 0.09 * 300


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


def test_a_win_rate_counts_a_tie_half() -> None:
    assert win_rate(3, 2, 5).mean == pytest.approx(0.4)
    assert win_rate(0, 7, 0).mean == 0.5, "all ties"
    assert win_rate(1, 0, 0).mean == 1.0 and win_rate(0, 0, 1).mean == 0.0


def test_the_interval_of_a_win_rate_is_scipys_exact_one_and_never_a_point() -> None:
    for wins, losses in ((5, 0), (0, 5), (8, 2), (1, 0), (40, 40)):
        expected = stats.binomtest(wins, wins + losses).proportion_ci()
        found = win_rate(wins, 0, losses)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.low < found.high
    ties = win_rate(0, 7, 0)
    assert ties.low < 0.5 < ties.high
    rng, covered = np.random.default_rng(0), 0
    for wins, ties, losses in rng.multinomial(10, [0.55, 0.35, 0.1], size=2000).tolist():
        interval = win_rate(wins, ties, losses)
        covered += interval.low <= 0.725 <= interval.high
    assert covered >= 0.95 * 2000


def test_the_best_of_k_grows_with_k() -> None:
    values = np.random.default_rng(10).normal(size=(20_000, 6))
    assert best_of_k(values).mean() > best_of_k(values[:, :3]).mean() > best_of_k(values[:, :1]).mean()


def test_with_one_image_per_prompt_the_best_is_that_image() -> None:
    values = np.array([[1.0], [2.0]])
    np.testing.assert_array_equal(best_of_k(values), [1.0, 2.0])
    np.testing.assert_array_equal(best_by_average({"a": values})["a"], [1.0, 2.0])


def test_the_best_by_average_is_one_image_for_all_scorers() -> None:
    a = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    b = np.array([[9.0, 2.0, 3.0], [1.0, 5.0, 5.0]])
    best = best_by_average({"a": a, "b": b})
    np.testing.assert_array_equal(best["a"], [1.0, 0.0])
    np.testing.assert_array_equal(best["b"], [9.0, 5.0])  # of two equal images the first
    wide = best_by_average({"a": a, "b": b / 100})
    np.testing.assert_array_equal(wide["a"], [3.0, 0.0])  # raw scores: the wider scale decides


UP, DOWN, AROUND = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.0, -0.1, 0.1)


def test_a_scorer_needs_the_interval_and_the_sign_test() -> None:
    assert verdict(UP, 0.01, 9, False) == "improved"
    assert verdict(DOWN, 0.01, -9, False) == "regressed"
    assert verdict(AROUND, 0.01, 9, False) == "inconclusive"
    assert verdict(UP, 0.05, 9, False) == verdict(DOWN, 0.05, -9, False) == "inconclusive"
    assert verdict(Interval(0.1, 0.0, 0.2), 0.01, 9, False) == "inconclusive"
    assert verdict(Interval(-0.1, -0.2, 0.0), 0.01, -9, False) == "inconclusive"
    assert verdict(Interval(0.0, 0.0, 0.0), 1.0, 0, False) == "inconclusive", "all ties"
    assert verdict(UP, 0.01, -9, False) == verdict(DOWN, 0.01, 9, False) == "inconclusive", "the two disagree"
    assert verdict(UP, 0.01, 9, True) == verdict(DOWN, 0.5, 0, True) == "drift"


ROLES: dict[str, Role] = {
    "oracle": "truth",
    "pickscore": "in-domain",
    "hps": "held-out",
    "imagereward": "held-out",
    "clip": "alignment",
    "beauty": "aesthetics",
    "sharpness": "drift",
}


@pytest.mark.parametrize(
    ("moved", "expected", "words"),
    [
        # Without a scorer that knows the truth
        ({"hps": 1}, "improved", ["hps"]),
        ({"hps": 1, "imagereward": 1, "pickscore": 1}, "improved", ["hps and imagereward"]),
        ({"hps": 1, "beauty": -1}, "improved", ["hps"]),
        ({"pickscore": 1}, "inconclusive", ["pickscore alone", "no held-out scorer confirms"]),
        ({"beauty": 1, "pickscore": 1}, "inconclusive", ["pickscore and beauty alone", "not enough"]),
        ({"clip": 1}, "inconclusive", ["clip alone"]),
        ({"pickscore": -1}, "inconclusive", ["pickscore alone", "not enough to call it regressed"]),
        ({"hps": -1}, "regressed", ["hps"]),
        ({"clip": -1, "hps": 1}, "regressed", ["worse", "clip", "although hps improved"]),
        ({"hps": 1, "imagereward": -1}, "regressed", ["imagereward"]),
        ({}, "inconclusive", ["No scorer sees a difference"]),
        # With one
        ({"oracle": 1}, "improved", ["oracle", "truth"]),
        ({"oracle": 1, "clip": -1}, "regressed", ["clip", "although oracle improved"]),
        ({"oracle": -1, "hps": 1}, "regressed", ["oracle"]),
        ({"oracle": 0, "hps": 1}, "inconclusive", ["hps alone", "truth does not confirm"]),
        ({"oracle": 0}, "inconclusive", ["No scorer sees a difference"]),
    ],
)
def test_the_rule_of_the_overall_verdict(moved: dict[str, int], expected: str, words: list[str]) -> None:
    said = {1: "improved", 0: "inconclusive", -1: "regressed"}
    verdicts = {name: said[moved.get(name, 0)] for name in ROLES if name != "oracle" or "oracle" in moved}
    verdicts["sharpness"] = "drift"
    found, reason = overall_verdict(verdicts, ROLES, {"goodhart": "ok", "stagnation": "warn", "broken": "not run"})
    assert found == expected
    assert all(word in reason for word in words), reason
    assert "\n" not in reason and reason.endswith(".")


@pytest.mark.parametrize(
    ("moved", "words", "not_said"),
    [
        (["sharpness"], ["No scorer that can tell better from worse sees", "change by sharpness"], "No scorer sees"),
        (["hps"], ["mean moved by hps", "sign test"], "No scorer"),
        (["hps", "clip", "sharpness"], ["moved by hps and clip, ", "change by sharpness"], "No scorer"),
        ([], ["No scorer sees a difference"], "change"),
    ],
)
def test_no_difference_is_denied_that_a_table_shows_in_bold(moved: list[str], words: list[str], not_said: str) -> None:
    verdicts = {"hps": "inconclusive", "clip": "inconclusive", "sharpness": "drift"}
    found, reason = overall_verdict(verdicts, ROLES, {}, IMAGES, moved)
    assert found == "inconclusive" and all(word in reason for word in words) and not_said not in reason, reason
    assert "\n" not in reason and reason.endswith(".")


ALARMS = {"goodhart": "alarm", "photometry": "warn", "x": "alarm"}


@pytest.mark.parametrize(
    ("moved", "expected", "words", "not_said"),
    [
        ({"hps": 1}, "suspect", ["so the higher scores by hps may not mean better images"], "worse"),
        ({"hps": 1, "pickscore": -1}, "suspect", ["higher scores by hps", "pickscore got worse"], "although"),
        ({}, "suspect", ["no score is clearly better or worse"], "higher"),
        # A fall wins over an alarm, and nothing is called higher that fell
        ({"hps": -1}, "regressed", ["worse than the baseline by hps; the alarms", "went off too"], "higher"),
        ({"pickscore": 1, "hps": -1}, "regressed", ["worse", "by hps, although pickscore improved"], "higher"),
        (dict.fromkeys(["hps", "imagereward", "clip", "pickscore", "beauty"], -1), "regressed", ["hps"], "higher"),
        ({"pickscore": -1, "beauty": -1}, "regressed", ["by pickscore and beauty"], "higher"),
        ({"oracle": -1, "hps": 1}, "regressed", ["by oracle, although hps improved"], "higher"),
    ],
)
def test_an_alarm_makes_any_result_suspect_but_a_fall(
    moved: dict[str, int], expected: str, words: list[str], not_said: str
) -> None:
    said = {1: "improved", 0: "inconclusive", -1: "regressed"}
    verdicts = {name: said[moved.get(name, 0)] for name in ROLES if name != "oracle" or "oracle" in moved}
    verdicts["sharpness"] = "drift"
    found, reason = overall_verdict(verdicts, ROLES, ALARMS)
    assert found == expected and all(word in reason for word in words) and not_said not in reason, reason
    assert "alarms goodhart and x" in reason and "photometry" not in reason
    assert "\n" not in reason and reason.endswith(".")


def test_without_a_scorer_of_quality_nothing_is_concluded() -> None:
    for verdicts in ({}, {"sharpness": "drift"}):
        found, reason = overall_verdict(verdicts, ROLES, {})
        assert found == "inconclusive" and "No scorer that can tell" in reason


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_the_same_model_with_other_seeds_is_inconclusive_in_93_of_100_evaluations(shared: float) -> None:
    names = ["pickscore", "hps", "imagereward", "clip", "beauty"]

    def evaluate(rng: np.random.Generator) -> str:
        common = rng.normal(size=(2, 200, 4))  # what scorers agree on about an image
        difficulty = rng.normal(size=(5, 200, 1))
        noise = rng.normal(size=(2, 5, 200, 4))
        models = difficulty + shared * common[:, None] + (1 - shared) * noise  # (model, scorer, prompts, images)
        p_values, intervals = [], []
        for base, other in zip(*models, strict=True):
            wins, _, losses = win_tie_loss(other, base)
            p_values.append(sign_test_p(wins, losses))
            intervals.append((paired_difference(other, base), wins - losses))
        verdicts = {
            name: verdict(interval, float(p), lead, False)
            for name, (interval, lead), p in zip(names, intervals, holm(p_values), strict=True)
        }
        return overall_verdict(verdicts, ROLES, {})[0]

    found = [evaluate(np.random.default_rng(seed)) for seed in range(100)]
    assert found.count("inconclusive") >= 93


def test_a_true_gain_of_a_held_out_scorer_is_seen() -> None:
    rng = np.random.default_rng(11)
    base = rng.normal(20, 2, (200, 1)) + rng.normal(size=(200, 4))
    better = base + 0.3 + rng.normal(0, 0.5, size=(200, 4))
    wins, _, losses = win_tie_loss(better, base)
    p = holm([sign_test_p(wins, losses), 0.6, 0.9])
    said = verdict(paired_difference(better, base), float(p[0]), wins - losses, False)
    assert overall_verdict({"hps": said, "clip": "inconclusive"}, ROLES, {})[0] == "improved"
