"""Which rate, guidance scale and round a method gets, by mean scores on validation prompts. Larger = better."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChosenRate:
    """What a method was given, and what it was chosen by."""

    learning_rate: float
    guidance_scale: float
    score: float
    """Mean on validation prompts."""
    at_edge: bool
    """The rate is the lowest or the highest of several that could be had: a better one may lie outside."""


def best_guidance(means: Mapping[float, float]) -> float:
    """The scale with the highest mean; of equal ones the lowest, which is the cheapest and the closest to the model."""
    return max(sorted(means), key=lambda scale: means[scale])


def choose(by_rate: Mapping[float, Mapping[float, float] | None]) -> ChosenRate | None:
    """The rate whose best guidance scale scores highest; of equal ones the lower rate.

    Args:
        by_rate: learning rate -> guidance scale -> mean, or None for a run that has no end.

    Returns:
        None when no rate has a score.
    """
    finished = {rate: means for rate, means in by_rate.items() if means}
    if not finished:
        return None
    rate = max(sorted(finished), key=lambda rate: max(finished[rate].values()))
    scale = best_guidance(finished[rate])
    at_edge = len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))
    return ChosenRate(rate, scale, finished[rate][scale], at_edge)


def best_round(means: Mapping[int, float]) -> int:
    """The round with the highest mean; of equal ones the first."""
    return max(sorted(means), key=lambda k: means[k])
