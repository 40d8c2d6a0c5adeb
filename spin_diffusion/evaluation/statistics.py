"""Intervals and tests for scores of the same prompts under several models.

The unit is the prompt: images of one prompt are averaged first, and prompts are what is resampled, so that many images
of few prompts do not look like much evidence. Everything here is a pure function of numpy arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
