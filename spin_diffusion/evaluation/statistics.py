"""Intervals and tests for scores of the same prompts under several models, and what may be concluded from them.

The unit is the prompt: images of one prompt are averaged first, and intervals speak of prompts, so that many images of
few prompts do not look like much evidence. Everything here is a pure function of numpy arrays.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.modalities import IMAGES, Modality
from spin_diffusion.evaluation.records import AlarmState, ModelVerdict, Role, ScorerVerdict

SIGNIFICANCE = 0.05
"""Largest p-value, adjusted by Holm over all tests that are made at once, that counts as evidence."""

_ROUNDING = 2.0**-22
"""Scores are made in fp32: what differs by less than this share of them does not differ."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def mean_interval(values_by_prompt: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean over prompts with Student's t-interval over prompts.

    How often a 95 % interval holds the true mean at 5, 10 and 20 prompts, in simulation (20,000 sets each): 95 % for
    normal values, 96 % for heavy tails (t with 3 degrees of freedom), 94 to 99 % for rounded values with many ties. It
    fails for skewed values: 88, 90 and 92 % for exponential ones, 82, 83 and 87 % for lognormal ones, 93 to 95 % at 200
    prompts; and for outcomes that are nearly always the same, such as 9 of 10, 88 % at 20 to 50 prompts.

    Equal values x have no spread to estimate an interval from. Theirs is that of a mean of values x and -x (Clopper and
    Pearson): at 95 % it reaches 0 for 5 prompts and not for 6, as the sign test does. All zeros have no width.

    Args:
        values_by_prompt: (prompts,) or (prompts, images).

    Raises:
        ValueError: fewer than 2 prompts, values that are not finite, or any other shape.
    """
    values = _by_prompt(values_by_prompt, "values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if np.ptp(values) == 0:
        value = float(values[0])
        unseen = 1 - ((1 - confidence) / 2) ** (1 / values.size)  # the largest share of -x that this fits
        nearer = value - 2 * unseen * value
        return Interval(value, min(value, nearer), max(value, nearer))
    mean, width = float(values.mean()), float(half_width(values, confidence))
    return Interval(mean, mean - width, mean + width)


def half_width(values: np.ndarray, confidence: float) -> np.ndarray | np.floating:
    """Half the width of Student's t-interval of the mean over the last axis."""
    n = values.shape[-1]
    return stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(axis=-1, ddof=1) / math.sqrt(n)


def paired_difference(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean of a - b over the same prompts with its interval, as `mean_interval`; above 0: `a` scores higher.

    Args:
        a: (prompts,) or (prompts, images).
        b: the same shape, the same prompts in the same order.

    Raises:
        ValueError: the shapes differ, or as in `mean_interval`.
    """
    return mean_interval(_difference_by_prompt(a, b), confidence)


def win_tie_loss(a: np.ndarray, b: np.ndarray, tolerance: float = 0.0) -> tuple[int, int, int]:
    """Prompts where `a` scores higher than `b`, where they differ by `tolerance` at most, and where `b` scores higher.

    Args:
        a: (prompts,) or (prompts, images); a prompt counts once, by the mean of its images.
        b: the same shape, the same prompts in the same order.

    Raises:
        ValueError: a negative tolerance, or as in `paired_difference`.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    difference = _difference_by_prompt(a, b)
    wins, losses = int((difference > tolerance).sum()), int((difference < -tolerance).sum())
    return wins, difference.size - wins - losses, losses


def sign_test_p(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the sign test (ties are left out); 1.0 when there is neither a win nor a loss."""
    if wins < 0 or losses < 0:
        raise ValueError(f"wins and losses must not be negative, got {wins} and {losses}")
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, p=0.5).pvalue)


def t_test_p(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of the paired t-test: 1 minus the confidence at which the interval of the difference meets 0.

    Args:
        a, b: as in `paired_difference`.
    """
    difference = _difference_by_prompt(a, b)
    if np.ptp(difference) == 0:
        return sign_test_p(difference.size, 0) if difference[0] else 1.0
    return float(stats.ttest_1samp(difference, 0.0).pvalue)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted for how many there are (Holm's step-down), in the order given.

    Raises:
        ValueError: not one axis, or a value outside of 0 to 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be one list of numbers from 0 to 1, got {p_values}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)).clip(max=1)
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted


def win_rate(wins: int, ties: int, losses: int, confidence: float = 0.95) -> Interval:
    """Share of prompts that the model wins, from 0 to 1, a tie counting half, with its interval.

    The interval is Clopper and Pearson's, exact without ties and too wide with them: a tie varies less than a win and a
    loss. 5 wins of 5 are 1 [0.48, 1].

    Raises:
        ValueError: a negative count, or no prompt at all.
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses == 0:
        raise ValueError(f"a win rate needs counts of at least one prompt, got {wins}, {ties} and {losses}")
    won, lost, tail = wins + ties / 2, losses + ties / 2, (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, won, lost + 1)) if won else 0.0
    high = float(stats.beta.ppf(1 - tail, won + 1, lost)) if lost else 1.0
    return Interval(won / (won + lost), low, high)


def best_of_k(values: np.ndarray) -> np.ndarray:
    """The best score among the images of each prompt: (prompts, images) -> (prompts,).

    It grows with the number of images even when the model stays the same: compare it at equal numbers only.

    Raises:
        ValueError: another shape, no image, or values that are not finite.
    """
    return _by_image(values, "values").max(axis=1)


def expected_best_of(values: np.ndarray, m: int) -> np.ndarray:
    """Expected best score of m images, from k >= m images of each prompt: (prompts, images) -> (prompts,).

    The mean of the maximum over all subsets of m images, without drawing any. It is unbiased for the best of m fresh
    images; m = 1 is the mean over the images, m = k is `best_of_k`.

    Raises:
        ValueError: m is not from 1 to k, or as in `best_of_k`.
    """
    values = _by_image(values, "values")
    num_images = values.shape[1]
    if not 1 <= m <= num_images:
        raise ValueError(f"m must be from 1 to the {num_images} images per prompt, got {m}")
    # The i-th smallest of k images is the best of those subsets that take their other m - 1 from the i - 1 below it.
    subsets = math.comb(num_images, m)
    weights = np.array([math.comb(below, m - 1) / subsets for below in range(num_images)])
    return np.sort(values, axis=1) @ weights


def best_by_average(values_by_scorer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of one image per prompt: the one with the highest average over the scorers.

    The best-of-5 mode of SPIN-Diffusion (arXiv 2402.10210). The average is of raw scores, so that the scorer with the
    widest scale decides nearly alone. Of equal images the first is taken.

    Args:
        values_by_scorer: name of the scorer -> (prompts, images), the same images in the same order.

    Returns:
        Name of the scorer -> (prompts,).

    Raises:
        ValueError: no scorer, shapes that differ, or as in `best_of_k`.
    """
    arrays = {name: _by_image(values, name) for name, values in values_by_scorer.items()}
    if len(shapes := {values.shape for values in arrays.values()}) != 1:
        raise ValueError(f"scorers must score the same prompts and images, got shapes {sorted(shapes)}")
    best = np.mean(list(arrays.values()), axis=0).argmax(axis=1)
    return {name: np.take_along_axis(values, best[:, None], axis=1)[:, 0] for name, values in arrays.items()}


def verdict(interval: Interval, p_holm: float, lead: int, drift: bool) -> ScorerVerdict:
    """What one scorer says of a model against the baseline.

    "improved" asks for both a mean difference and a majority of wins that are beyond chance: a mean that a few prompts
    carry and a majority of tiny wins are each not enough. "regressed" mirrors it. It takes 6 prompts at least.

    With tests adjusted by Holm over all of an evaluation, at most 5 % of evaluations call any model improved
    or regressed that is the same as the baseline, however many scorers, models and guidance scales there are. Measured
    with five scorers that have nothing in common, in 1000 simulated evaluations of one model each on 20 and on 200
    prompts: 0.5 and 0.8 % (normal differences), 0.1 and 0.4 % (heavy tails), 0.8 and 1.2 % (many ties). A model that is
    another but whose means are the baseline's, by exponential differences: 3 to 7 %.

    Args:
        interval: of the paired difference, model minus baseline.
        p_holm: the larger p-value of the sign test and the t-test, adjusted by Holm over all that are made at once.
        lead: wins minus losses.
        drift: the score is good neither up nor down; the answer is then "drift", whatever the numbers.

    Raises:
        ValueError: numbers that are not finite, or a p-value outside of 0 to 1.
    """
    if not (0 <= p_holm <= 1 and np.isfinite([interval.mean, interval.low, interval.high]).all()):
        raise ValueError(f"a verdict needs finite numbers and a p-value from 0 to 1, got {interval} and {p_holm}")
    if drift:
        return "drift"
    if p_holm < SIGNIFICANCE and interval.low > 0 and lead > 0:
        return "improved"
    if p_holm < SIGNIFICANCE and interval.high < 0 and lead < 0:
        return "regressed"
    return "inconclusive"


def overall_verdict(
    verdicts: Mapping[str, ScorerVerdict],
    roles: Mapping[str, Role],
    alarms: Mapping[str, AlarmState],
    modality: Modality = IMAGES,
    moved: Collection[str] = (),
) -> tuple[ModelVerdict, str]:
    """What is concluded of one model at one guidance scale, and why in one sentence.

    The first of these rules that applies:

    1. regressed: a scorer of the role truth, held-out or alignment regressed; or any other that can tell better from
       worse did, none improved, and an alarm is in state "alarm". A fall wins over an alarm.
    2. suspect: any alarm is in state "alarm"; scores that rise beside it may be won by cheating.
    3. improved: the truth improved; or no scorer knows the truth and a held-out one improved.
    4. inconclusive: anything else. An in-domain scorer judges what the model was trained to please, an aesthetics
       scorer does not read the prompt, and an alignment scorer guards against harm: none of them is enough alone.

    Args:
        verdicts: scorer -> its `verdict`.
        roles: scorer -> its role; at least the scorers of `verdicts`.
        alarms: id of the alarm -> its state.
        modality: what the model makes, for the sentence.
        moved: scorers whose interval of the difference excludes 0, for the sentence: a reader of the tables sees it.
    """
    fired = [alarm for alarm, state in alarms.items() if state == "alarm"]
    alarm = f"the alarm{'s' if len(fired) > 1 else ''} {listed(fired)} went off" if fired else ""

    def named(said: ScorerVerdict, *wanted: Role) -> list[str]:
        return [name for name, its in verdicts.items() if its == said and roles[name] in wanted]

    rose, fell = named("improved", *_QUALITY), named("regressed", *_QUALITY)
    if (judges := named("regressed", "truth", "held-out", "alignment")) or (fired and fell and not rose):
        beside = f", although {listed(rose)} improved" if rose else ""
        also = f"; {alarm} too" if fired else ""
        return "regressed", f"The model is worse than the baseline by {listed(judges or fell)}{beside}{also}."
    if fired:
        if rose:
            worse = f", and {listed(fell)} got worse" if fell else ""
            doubt = f"so the higher scores by {listed(rose)} may not mean better {modality.plural}{worse}"
        else:
            doubt = "although no score is clearly better or worse"
        return "suspect", f"T{alarm[1:]}, {doubt}: read what is said there before you believe any score."

    knows_truth = any(roles[name] == "truth" for name in verdicts)
    if knows_truth and (better := named("improved", "truth")):
        return "improved", f"The model is better than the baseline by {listed(better)}, which knows the truth."
    if not knows_truth and (better := named("improved", "held-out")):
        return "improved", (
            f"The model is better than the baseline by {listed(better)}, {modality.held_out}, "
            "and worse by no scorer that counts."
        )

    if not any(roles[name] in _QUALITY for name in verdicts):
        return "inconclusive", "No scorer that can tell better from worse was run."
    return "inconclusive", _why_inconclusive(
        rose, fell, knows_truth, {name: verdicts[name] for name in moved if name in verdicts}
    )


def _why_inconclusive(
    rose: Sequence[str], fell: Sequence[str], knows_truth: bool, moved: Mapping[str, ScorerVerdict]
) -> str:
    if rose:
        lacking = "the scorer that knows the truth" if knows_truth else "no held-out scorer"
        confirms = "does not confirm it" if knows_truth else "confirms it"
        return (
            f"The model is better than the baseline by {listed(rose)} alone, and {lacking} {confirms}; "
            "that is not enough to call it improved."
        )
    if fell:
        return (
            f"The model is worse than the baseline by {listed(fell)} alone, and no other scorer confirms it; "
            "that is not enough to call it regressed."
        )
    drifted = [name for name, its in moved.items() if its == "drift"]
    beside = f" It did change by {listed(drifted)}, which is neither good nor bad." if drifted else ""
    if unconfirmed := [name for name, its in moved.items() if its == "inconclusive"]:
        return (
            f"The mean moved by {listed(unconfirmed)}, but not beyond chance once wins and losses (sign test) and the "
            f"number of tests are minded: a few prompts carry it, or there are too few.{beside}"
        )
    no_scorer = "No scorer that can tell better from worse" if drifted else "No scorer"
    return (
        f"{no_scorer} sees a difference to the baseline: there is none, or it is too small for this many "
        f"prompts.{beside}"
    )


_QUALITY: tuple[Role, ...] = ("truth", "in-domain", "held-out", "alignment", "aesthetics")


def required_prompts(sd_of_difference: float, difference: float, power: float = 0.8) -> int:
    """How many prompts show a true mean difference: its 95 % interval then excludes 0 with probability `power`.

    The fewest whose t-test has that power for normal differences. The sign test, which `verdict` asks for as well,
    needs up to 1.57 times as many (pi / 2), and Holm over several scorers some more: `benchmarks/power.py` counts them.

    Args:
        sd_of_difference: standard deviation over prompts of the paired differences, in the unit of the score. From an
            evaluation of n prompts: half the width of the difference's interval times sqrt(n) / t, where t is 2.78 for
            5 prompts, 2.09 for 20 and 1.96 for many.
        difference: mean difference to be seen, in the same unit; its sign does not matter.
        power: from above 0.05 to below 1.

    Raises:
        ValueError: a standard deviation or difference that is not above 0 and finite, or another power.
    """
    size = abs(difference)
    if not (0 < sd_of_difference < math.inf and 0 < size < math.inf):
        raise ValueError(
            f"sd_of_difference and difference must be above 0 and finite, got {sd_of_difference} and {difference}"
        )
    if not SIGNIFICANCE < power < 1:
        raise ValueError(f"power must lie between {SIGNIFICANCE} and 1, got {power}")
    quantiles = stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(power)
    n = max(2, math.floor((quantiles * sd_of_difference / size) ** 2))  # a little too few
    while stats.nct.sf(stats.t.ppf(1 - SIGNIFICANCE / 2, n - 1), n - 1, math.sqrt(n) * size / sd_of_difference) < power:
        n += 1
    return n


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _by_image(values: np.ndarray, name: str) -> np.ndarray:
    """(prompts, images) float64."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must have shape (prompts, images), got {values.shape}")
    if not np.isfinite(values).all():
        prompt = int(np.argwhere(~np.isfinite(values))[0][0])
        raise ValueError(f"{name} must be finite, got {values[prompt].tolist()} for prompt number {prompt}")
    return values


def _by_prompt(values: np.ndarray, name: str) -> np.ndarray:
    """(prompts,) float64, averaged over images."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise ValueError(f"{name} must have shape (prompts,) or (prompts, images), got {values.shape}")
    if len(values) < 2:
        raise ValueError(f"{name} must hold at least 2 prompts for an interval, got {len(values)}")
    if not np.isfinite(values).all():
        prompt = int(np.argwhere(~np.isfinite(values))[0][0])
        raise ValueError(f"{name} must be finite, got {values[prompt].tolist()} for prompt number {prompt}")
    return values if values.ndim == 1 else values.mean(axis=1)


def _difference_by_prompt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(prompts,) a - b, without what is rounding alone: differences that are 0 but for it, or all the same."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a and b must score the same prompts and images, got shapes {np.shape(a)} and {np.shape(b)}")
    a, b = _by_prompt(a, "a"), _by_prompt(b, "b")
    difference, rounding = a - b, _ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(difference) <= rounding:
        difference = np.full(difference.size, difference[0])
    return np.where(np.abs(difference) <= rounding, 0.0, difference)
