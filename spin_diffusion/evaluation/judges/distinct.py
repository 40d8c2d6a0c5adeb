"""Distinct 3-grams: how little an answer repeats itself. Models that collapse begin to loop, which this shows first.

Neither way is better in itself: a poem repeats itself with reason, and noise never does.
"""

import re

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.specs import About

ABOUT = About(
    title="Distinct 3-grams",
    scale="1 - share of the answer's runs of three words that occurred before in it, 0 to 1; 1 = nothing is repeated",
    role="drift",
)

# Writing without spaces is counted by its characters: Thai, Lao, Burmese, Khmer, kana, Chinese, Hangul
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def load(device: str, path: str | None = None) -> Judge:
    """The judge; it has no weights."""
    return distinct


def distinct(answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
    """Share of distinct runs of three words among those of each answer."""
    return [1 - repeated_share(answer.text) for answer in answers]


def words(text: str) -> list[str]:
    """Words in lower case, and every other sign by itself."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of `n` words, in order; none for a text of fewer words."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def repeated_share(text: str) -> float:
    """Share of the runs of three words that occurred before, 0 to 1; 0 for a text of fewer words."""
    runs = ngrams(text, 3)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
