"""The interval of a mean over samples of which some share a prompt."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from scipy.stats import sem, t


class MeanInterval(TypedDict):
    """A mean and its interval."""

    mean: float
    low: float | None
    high: float | None


def clustered_mean(values: Sequence[float], groups: Sequence[str]) -> MeanInterval:
    """Mean of all values, and its 95 % t-interval over groups: values of one group say much the same.

    Args:
        values: finite.
        groups: of each value, such as its prompt.

    Returns:
        mean, low, high; the last two are None where there is no spread between groups to estimate them from.
    """
    mean = float(np.mean(values))
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    # As many numbers as groups, whose mean is 0 and which are what each group adds to the mean's deviation
    sums = np.bincount([number[group] for group in groups], np.asarray(values) - mean)
    error = float(sem(sums)) * len(number) / len(values) if len(number) > 1 else 0.0
    low, high = t.interval(0.95, len(number) - 1, mean, error) if error > 0 else (None, None)
    return {"mean": mean, "low": low if low is None else float(low), "high": high if high is None else float(high)}


def is_above_zero(found: MeanInterval) -> bool:
    """Whether its interval is; where it has none, whether it is itself."""
    return (found["mean"] if found["low"] is None else found["low"]) > 0


def interval_text(found: MeanInterval) -> str:
    """The mean with its interval, or why it has none."""
    if found["low"] is None:
        return f"{found['mean']:+.4f} (no interval: its prompts are one, or all alike)"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
