"""Who may look at a player while it is trained, and what is asked of them (`watching` asks)."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spin_diffusion.selfplay.clustered import MeanInterval, clustered_mean
from spin_diffusion.selfplay.record import Better

JUDGED_PROMPTS = 32
"""Held-out prompts at most for which samples are drawn and scored to judge a step by a scorer."""
PREVIEWED_PROMPTS = 4
"""Prompts of previews."""


Values = Sequence[float | None]
"""What a judge says of a player, in an order that is the same each time."""


@dataclass(frozen=True)
class Judged:
    """What a judge says of the present player on held-out samples, the same ones in the same order each time.

    Attributes:
        values: of each sample, None or not finite = the player spoilt it; or what the judge's `change` compares.
        prompts: of each sample.
        worked_on: samples that this process worked on.
    """

    values: Sequence[float | None]
    prompts: Sequence[str]
    worked_on: int


def paired_change(values: Values, start: Values, prompts: Sequence[str]) -> MeanInterval | None:
    """The mean difference to the values of a round's start, with its 95 % interval over prompts, sample by sample; None
    where a sample is spoilt that the start had. What the start spoilt is left out."""
    pairs = [(value, before, prompt) for value, before, prompt in zip(values, start, prompts, strict=True)]
    pairs = [pair for pair in pairs if pair[1] is not None and math.isfinite(pair[1])]
    differences = [value - before for value, before, _ in pairs if value is not None and before is not None]
    if not pairs or len(differences) < len(pairs) or not all(map(math.isfinite, differences)):
        return None
    return clustered_mean(differences, [prompt for *_, prompt in pairs])


@dataclass(frozen=True)
class Judge:
    """Who judges the player in training.

    Attributes:
        name: by what, such as gap.
        key: what decides its values, beside the player and the round.
        judge: called by all processes with the folder for what is drawn, which differs from step to step.
        change: of a player's values against those of the round's start, on their prompts; None = it cannot be told.
        better: which change is the better one.
    """

    name: str
    key: str
    judge: Callable[[Path], Judged]
    change: Callable[[Values, Values, Sequence[str]], MeanInterval | None] = paired_change
    better: Better = "higher"


@dataclass(frozen=True)
class Preview:
    """Who draws previews.

    Attributes:
        every: optimizer steps from one to the next; None = as `preview_steps` has it.
        draw: called by all processes with the round's folder, its name for trackers and the step; how many pictures
            this process drew.
    """

    every: int | None
    draw: Callable[[Path, str, int], int]


def preview_steps(every: int | None, steps: int) -> Collection[int]:
    """After which of a round's steps previews are drawn, every so many steps (0 = never); None = few of them, the first
    ones early, when it is seen soonest whether a setting is wrong."""
    if every is None:
        return {0, math.ceil(steps / 16), math.ceil(steps / 4), steps}
    return range(0, steps + 1, every) if every else ()


@dataclass
class Took:
    """What looks took of a process."""

    seconds: float = 0.0
    samples: int = 0


@dataclass
class Watch:
    """Who looks at the player, and after training what that took, by the ledger's phase."""

    judge: Judge | None = None
    preview: Preview | None = None
    took: dict[str, Took] = field(default_factory=dict)


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:06d}"
