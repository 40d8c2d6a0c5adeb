"""The gallery of answers: each text as the page shows it, shortened where it is long."""

from collections.abc import Callable
from dataclasses import dataclass

from spin_diffusion.evaluation.report import wording
from spin_diffusion.evaluation.report.pictures import Pair
from spin_diffusion.evaluation.report.reading import AnswerRow, Evaluation

_FINISH = {"stop": "ended by itself", "length": "cut at the longest answer allowed"}


@dataclass(frozen=True)
class Passage:
    """An answer inside of the page."""

    text: wording.Text
    """Its short form is empty where the answer is empty."""
    note: str
    """How long it is and how it ended."""


def passages(evaluation: Evaluation) -> Callable[[str, Pair], Passage | str]:
    """(model, pair) -> its answer, or why there is none."""
    rows = {(row.model, (row.id, row.k)): row for row in evaluation.samples if isinstance(row, AnswerRow)}

    def passage_of(model: str, pair: Pair) -> Passage | str:
        row = rows.get((model, pair))
        if row is None:
            return "did not answer"
        tokens = f"{row.num_tokens:,} token{'' if row.num_tokens == 1 else 's'}"
        return Passage(wording.passage(row.text), f"{tokens}, {_FINISH.get(row.finish, row.finish)}")

    return passage_of
