"""Distinct 3-grams: how little an answer repeats itself. Models that collapse begin to loop, which this shows first.

Neither way is better in itself: a poem repeats itself with reason, and noise never does.
"""

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.specs import About
from spin_diffusion.evaluation.words import repeated_share

ABOUT = About(
    title="Distinct 3-grams",
    scale="1 - share of the answer's runs of three words that occurred before in it, 0 to 1; 1 = nothing is repeated",
    role="drift",
)


def load(device: str, path: str | None = None) -> Judge:
    """The judge; it has no weights."""
    return distinct


def distinct(answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
    """Share of distinct runs of three words among those of each answer."""
    return [1 - repeated_share(answer.text) for answer in answers]
