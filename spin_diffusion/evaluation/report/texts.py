"""The gallery of answers: each text as the page shows it, shortened where it is long."""

from dataclasses import dataclass
from pathlib import Path

from spin_diffusion.evaluation.report import wording
from spin_diffusion.evaluation.report.rows import SampleRow

_FINISH = {"stop": "ended by itself", "length": "cut at the longest answer allowed"}


@dataclass(frozen=True)
class AnswerRow(SampleRow):
    """One answer that a model gave."""

    text: str
    reference: str | None
    """The real answer."""
    finish: str
    num_tokens: int
    state: str


@dataclass(frozen=True)
class Passage:
    """An answer inside of the page."""

    text: wording.Text
    """Its short form is empty where the answer is empty."""
    note: str
    """How long it is and how it ended."""


def passage(directory: Path, row: AnswerRow) -> Passage:
    """The answer of a row, which holds all of it."""
    tokens = f"{row.num_tokens:,} token{'' if row.num_tokens == 1 else 's'}"
    return Passage(wording.passage(row.text), f"{tokens}, {_FINISH.get(row.finish, row.finish)}")
