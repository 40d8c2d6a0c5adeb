"""Rules that several alarms share: when an effect counts, and how it is said.

An effect counts when it is beyond chance (95 % interval over prompts): above its threshold it is an alarm, above half
of it a warning. Thresholds are set by judgement: no samples of released models have been measured for them.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.records import AlarmState
from spin_diffusion.evaluation.statistics import Interval, decimals_of, paired_difference

DIVERSITY_DROP = 0.10
"""Share of the base's diversity over seeds that is lost, 0 to 1."""
DIVERSITY_PROMPTS = 6
"""With fewer prompts neither diversity nor near duplicates are judged: that two of two change for the worse is chance
in one case of four, and that six of six do in one of 64."""
BROKEN_RISE = 0.01
"""Rise of the share of broken images, or of empty answers, 0 to 1."""


@dataclass(frozen=True)
class Alarm:
    """What one alarm found."""

    id: str
    state: AlarmState
    value: float | None
    """What was compared with the threshold; None = not run."""
    threshold: float | None
    explanation: str
    """In plain words, with numbers and with what to do; why it was not run."""


def state_of(size: float, threshold: float, beyond_chance: bool) -> AlarmState:
    """The state of an effect; half of the threshold is worth a warning, and chance is worth nothing."""
    if not beyond_chance or size <= threshold / 2:
        return "ok"
    return "alarm" if size > threshold else "warn"


def not_run(alarm: str, reason: str) -> Alarm:
    """The alarm that could not be computed, and why."""
    return Alarm(alarm, "not run", None, None, f"Not run: {reason}.")


def raised(alarm: str, value: float, threshold: float, state: AlarmState, numbers: str, advice: str) -> Alarm:
    """The alarm with its numbers in words, and its advice where it is more than "ok"."""
    return Alarm(alarm, state, value, threshold, numbers if state == "ok" else f"{numbers} {advice}")


def share_rises(alarm: str, before: np.ndarray, after: np.ndarray, threshold: float, what: str, advice: str) -> Alarm:
    """The alarm of a mean share, 0 to 1, that rises from the base to the model, paired by prompt."""
    difference = paired_difference(after, before)
    state = state_of(difference.mean, threshold, difference.low > 0)
    numbers = f"{what}: {before.mean():.1%} of the base's, {after.mean():.1%} of the model's."
    return raised(alarm, difference.mean, threshold, state, numbers, advice)


def diversity_falls(before: np.ndarray, after: np.ndarray, measure: str, beside: str, sample: str, what: str) -> Alarm:
    """The alarm of samples of one prompt that become alike; its value is the share of the base's diversity that is
    lost.

    Args:
        before, after: (prompts,) mean distance between the samples of a prompt.
        measure: how the distance is measured; other numbers of the same stand in `beside`.
        sample: what a base without diversity makes the same for every seed.
        what: what the model does.
    """
    alarm, level = "diversity_over_seeds", float(before.mean())
    if level <= 1e-6:
        return not_run(alarm, f"the base {sample} for every seed, so there is no diversity to lose")
    difference = paired_difference(after, before)
    drop = -difference.mean / level
    change = f"from {level:.3f} to {after.mean():.3f}, {signed(difference)}"
    numbers = f"Diversity over seeds ({measure}) goes {change}; {beside}."
    state = state_of(drop, DIVERSITY_DROP, difference.high < 0)
    advice = f"{what}: stop earlier, or train for fewer steps per round."
    return raised(alarm, drop, DIVERSITY_DROP, state, numbers, advice)


def count_rises(
    alarm: str, baseline: tuple[int, int], candidate: tuple[int, int], threshold: float, what: str, advice: str
) -> Alarm:
    """The alarm of samples in some state that become more.

    Only counts are compared, so the test is not paired: Fisher's exact one, one-sided. A rise above the threshold that
    chance would give in more than 1 of 200 cases is a warning only; so rare, because samples of one prompt tend to go
    wrong together, which the test does not know.

    Args:
        baseline, candidate: (samples in that state, all samples), at least one.
        threshold: of the rise of the share, 0 to 1; below it nothing is said.
        what: the samples in that state, at the beginning of a sentence.
    """
    rise = candidate[0] / candidate[1] - baseline[0] / baseline[1]
    state: AlarmState = "ok"
    if rise > threshold:
        table = [[candidate[0], candidate[1] - candidate[0]], [baseline[0], baseline[1] - baseline[0]]]
        state = "alarm" if stats.fisher_exact(table, alternative="greater").pvalue < 0.005 else "warn"
    counts = f"{baseline[0]} of {baseline[1]} of the base's, {candidate[0]} of {candidate[1]} of the model's"
    doubt = " It may still be chance: use more prompts to be sure." if state == "warn" else ""
    return raised(alarm, rise, threshold, state, f"{what}: {counts}.", advice + doubt)


def too_few_to_pair(per_prompt: int, num_prompts: int, min_prompts: int, sample: str) -> str | None:
    """Why samples of one prompt cannot be compared with each other; None = they can."""
    if per_prompt < 2:
        return f"there is one {sample} per prompt; draw 2 or more (4 say more)"
    if num_prompts < min_prompts:
        return f"{num_prompts} prompts are too few to tell; ask {min_prompts} or more"
    return None


def signed(interval: Interval) -> str:
    """A difference and its interval in a sentence."""
    # Three digits of the largest number: scorers differ in scale by a factor of 100
    return interval.signed(decimals_of(max(abs(interval.low), abs(interval.high), abs(interval.mean)), 3))


def trained_among(captions: Iterable[str], wanted: Iterable[str]) -> set[str]:
    """Those of the `normalised` prompts that are training captions, of which no other is kept in memory."""
    wanted = set(wanted)
    return {key for caption in captions if (key := normalised(caption)) in wanted}


def normalised(text: str) -> str:
    """The text without what makes no difference between two prompts: case, punctuation and white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(re.sub(r"[^\w\s]", " ", folded).split())
    return words or " ".join(folded.split())  # a prompt of emoji alone is compared as it is
