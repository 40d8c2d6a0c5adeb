"""Intervals and tests for scores of the same prompts under several models, and what may be concluded from them.

The unit is the prompt: images of one prompt are averaged first, and prompts are what is resampled, so that many images
of few prompts do not look like much evidence. Everything here is a pure function of numpy arrays.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.modalities import IMAGES, Modality
from spin_diffusion.evaluation.specs import Role

ScorerVerdict = Literal["improved", "inconclusive", "regressed", "drift"]
"""What one scorer says of a model against the baseline."""
ModelVerdict = Literal["improved", "inconclusive", "regressed", "suspect"]
"""What all scorers and alarms together say of it."""
AlarmState = Literal["ok", "warn", "alarm", "not run"]
"""State of an alarm: nothing seen; worth a look; believe no verdict before it is explained; could not be computed."""

SIGNIFICANCE = 0.05
"""Largest p-value, adjusted by Holm over the scorers of a comparison, that counts as evidence."""

_BATCH_ELEMENTS = 4_000_000  # values resampled at a time: bounds the memory, not the result


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def mean_interval(
    values_by_prompt: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over prompts with a percentile bootstrap interval over prompts.

    It is a little narrow for few prompts. How often a 95 % interval holds the true mean, in simulation (4000 sets of
    normal and of exponential scores): 93 and 91 % at 20 prompts, 94 and 93.5 % at 50, 95 and 94.5 % at 200.
    The accelerated (BCa) bootstrap does no better.

    Args:
        values_by_prompt: (prompts,) or (prompts, images).

    Raises:
        ValueError: fewer than 2 prompts, values that are not finite, or any other shape.
    """
    values = _by_prompt(values_by_prompt, "values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if np.ptp(values) == 0:
        # The mean of equal numbers can differ from them in the last bit, and would give a width that is not 0.
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    result = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, _BATCH_ELEMENTS // values.size),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(float(values.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high))


def paired_difference(
    a: np.ndarray, b: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of a - b over the same prompts with its bootstrap interval; above 0 means that `a` scores higher.

    Args:
        a: (prompts,) or (prompts, images).
        b: the same shape, the same prompts in the same order.

    Raises:
        ValueError: the shapes differ, or as in `mean_interval`.
    """
    return mean_interval(_difference_by_prompt(a, b), confidence, resamples, seed)


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


def win_rate(wins: int, ties: int, losses: int) -> float:
    """Share of prompts that the model wins, from 0 to 1; a tie counts half.

    Raises:
        ValueError: a negative count, or no prompt at all.
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses == 0:
        raise ValueError(f"a win rate needs counts of at least one prompt, got {wins}, {ties} and {losses}")
    return (wins + ties / 2) / (wins + ties + losses)


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


def verdict(interval: Interval, p_holm: float, drift: bool) -> ScorerVerdict:
    """What one scorer says of a model against the baseline.

    "improved" asks for both a difference whose interval lies above 0 and a sign test below SIGNIFICANCE: a mean that a
    few prompts carry and a majority of tiny wins are each not enough. "regressed" mirrors it.

    Args:
        interval: of the paired difference, model minus baseline.
        p_holm: sign test, adjusted by Holm over all scorers of this comparison.
        drift: the score is good neither up nor down; the answer is then "drift", whatever the numbers.

    Raises:
        ValueError: numbers that are not finite, or a p-value outside of 0 to 1.
    """
    if not (0 <= p_holm <= 1 and np.isfinite([interval.mean, interval.low, interval.high]).all()):
        raise ValueError(f"a verdict needs finite numbers and a p-value from 0 to 1, got {interval} and {p_holm}")
    if drift:
        return "drift"
    if p_holm < SIGNIFICANCE and interval.low > 0:
        return "improved"
    if p_holm < SIGNIFICANCE and interval.high < 0:
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

    1. suspect: any alarm is in state "alarm"; scores that rise beside it may be won by cheating.
    2. regressed: a scorer of the role truth, held-out or alignment regressed.
    3. improved: the truth improved; or no scorer knows the truth and a held-out one improved.
    4. inconclusive: anything else. An in-domain scorer judges what the model was trained to please, an aesthetics
       scorer does not read the prompt, and an alignment scorer guards against harm: none of them is enough alone.

    With `verdict` adjusted by Holm over the scorers, a model that is the same as the baseline is called improved or
    regressed in at most 5 % of evaluations, however many scorers there are. Measured with five that have nothing in
    common, in 1000 simulated evaluations of 200 prompts each: 1.5 % (normal differences), 0.9 % (heavy tails), 2.2 %
    (many ties).

    Args:
        verdicts: scorer -> its `verdict`.
        roles: scorer -> its role; at least the scorers of `verdicts`.
        alarms: id of the alarm -> its state.
        modality: what the model makes, for the sentence.
        moved: scorers whose interval of the difference excludes 0, for the sentence: tables show these numbers in bold.
    """
    fired = [alarm for alarm, state in alarms.items() if state == "alarm"]
    if fired:
        plural = "s" if len(fired) > 1 else ""
        return "suspect", (
            f"The alarm{plural} {_listed(fired)} went off, so higher scores may not mean better {modality.plural}: "
            "read what they say before you believe any score."
        )

    def named(said: ScorerVerdict, *wanted: Role) -> list[str]:
        return [name for name, its in verdicts.items() if its == said and roles[name] in wanted]

    judges = named("regressed", "truth", "held-out", "alignment")
    if judges:
        better = named("improved", *_QUALITY)
        beside = f", although {_listed(better)} improved" if better else ""
        return "regressed", f"The model is worse than the baseline by {_listed(judges)}{beside}."

    knows_truth = any(roles[name] == "truth" for name in verdicts)
    if knows_truth and (better := named("improved", "truth")):
        return "improved", f"The model is better than the baseline by {_listed(better)}, which knows the truth."
    if not knows_truth and (better := named("improved", "held-out")):
        return "improved", (
            f"The model is better than the baseline by {_listed(better)}, {modality.held_out}, "
            "and worse by no scorer that counts."
        )

    if not any(roles[name] in _QUALITY for name in verdicts):
        return "inconclusive", "No scorer that can tell better from worse was run."
    if better := named("improved", *_QUALITY):
        lacking = "the scorer that knows the truth" if knows_truth else "no held-out scorer"
        confirms = "does not confirm it" if knows_truth else "confirms it"
        return "inconclusive", (
            f"The model is better than the baseline by {_listed(better)} alone, and {lacking} {confirms}; "
            "that is not enough to call it improved."
        )
    if worse := named("regressed", *_QUALITY):
        return "inconclusive", (
            f"The model is worse than the baseline by {_listed(worse)} alone, and no other scorer confirms it; "
            "that is not enough to call it regressed."
        )
    drifted = [name for name in moved if verdicts.get(name) == "drift"]
    beside = f" It did change by {_listed(drifted)}, which is neither good nor bad." if drifted else ""
    if unconfirmed := [name for name in moved if verdicts.get(name) == "inconclusive"]:
        return "inconclusive", (
            f"The mean moved by {_listed(unconfirmed)}, but wins and losses do not confirm it (sign test): a few "
            f"prompts carry it, or there are too few.{beside}"
        )
    no_scorer = "No scorer that can tell better from worse" if drifted else "No scorer"
    return "inconclusive", (
        f"{no_scorer} sees a difference to the baseline: there is none, or it is too small for this many "
        f"prompts.{beside}"
    )


_QUALITY: tuple[Role, ...] = ("truth", "in-domain", "held-out", "alignment", "aesthetics")


def required_prompts(sd_of_difference: float, difference: float, power: float = 0.8) -> int:
    """How many prompts show a true mean difference: its 95 % interval then excludes 0 with probability `power`.

    Normal approximation, two-sided 5 %. The sign test, which `verdict` asks for as well, needs up to 1.57 times as many
    (pi / 2, for normal differences), and Holm over several scorers some more.

    Args:
        sd_of_difference: standard deviation over prompts of the paired differences, in the unit of the score. From an
            evaluation of n prompts: half the width of the difference's interval times sqrt(n) / 1.96.
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
    return max(2, math.ceil((quantiles * sd_of_difference / size) ** 2))


def _listed(names: Sequence[str]) -> str:
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
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a and b must score the same prompts and images, got shapes {np.shape(a)} and {np.shape(b)}")
    return _by_prompt(a, "a") - _by_prompt(b, "b")
