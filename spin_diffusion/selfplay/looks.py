"""Who may look at a player while it is trained, and what is asked of them (`watching` asks)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

JUDGED_PROMPTS = 32
"""Held-out prompts at most for which samples are drawn and scored to judge a step."""
PREVIEWED_PROMPTS = 4
"""Prompts of previews."""


@dataclass(frozen=True)
class Judged:
    """What a judge says of the present player on held-out samples, the same ones in the same order each time.

    Attributes:
        values: of each sample, larger = better; None or not finite = the player spoilt it.
        prompts: of each sample.
        worked_on: samples that this process worked on.
    """

    values: Sequence[float | None]
    prompts: Sequence[str]
    worked_on: int


@dataclass(frozen=True)
class Judge:
    """Who judges the player in training.

    Attributes:
        name: by what, such as gap.
        key: what decides its values, beside the player and the round.
        judge: called by all processes with the folder for what is drawn, which differs from step to step. A value of
            a whole set of samples is given as that of one sample.
    """

    name: str
    key: str
    judge: Callable[[Path], Judged]


@dataclass(frozen=True)
class Preview:
    """Who draws previews.

    Attributes:
        every: optimizer steps from one to the next.
        draw: called by all processes with the round's folder, its name for trackers and the step; how many pictures
            this process drew.
    """

    every: int
    draw: Callable[[Path, str, int], int]


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
