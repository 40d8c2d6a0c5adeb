"""Pick-a-Pic v1 and v2: two generated images of one caption and which of them a person preferred.

The winner (label 1) is the real image. A tie (0.5 and 0.5) says that neither image is the good one, so it is left out,
as Diffusion-DPO does; so is a row without a label. The loser is dropped unless losers are asked for.
"""

from collections.abc import Sequence

from spin_diffusion.data.report import Expected, LeftOut
from spin_diffusion.data.rows import Candidate, Plan, Row, Source, require_column
from spin_diffusion.data.settings import DataSettings


def recognises(columns: Sequence[str]) -> bool:
    """Whether there are two images and two labels of Pick-a-Pic's names."""
    return {"jpg_0", "jpg_1", "label_0", "label_1"} <= set(columns)


def plan(source: Source, settings: DataSettings, with_losers: bool) -> Plan:
    """Winner as the image, loser only if asked for. Raises InputError if the caption column does not exist."""
    caption_column = require_column(source, settings.caption_column or "caption", "--caption_column")
    flags = [column for column in ("has_label", "are_different") if column in source.columns]

    def candidate(row: Row) -> Candidate:
        values = row.values
        if values.get("has_label") is False:
            raise LeftOut(Expected.NO_LABEL, "has_label is false")
        winner = winner_of(values["label_0"], values["label_1"])
        if with_losers and values.get("are_different") is False:
            raise LeftOut(Expected.TIE, "the two images are the same one")
        loser = values[f"jpg_{1 - winner}"] if with_losers else None
        return Candidate(values[caption_column], values[f"jpg_{winner}"], loser)

    return Plan((caption_column, "jpg_0", "jpg_1", "label_0", "label_1", *flags), candidate)


def winner_of(label_0: object, label_1: object) -> int:
    """0 or 1: the image whose label is 1. Raises LeftOut for a tie or labels that name no winner."""
    labels = (_number(label_0), _number(label_1))
    if labels == (1.0, 0.0):
        return 0
    if labels == (0.0, 1.0):
        return 1
    if labels == (0.5, 0.5):
        raise LeftOut(Expected.TIE, "both labels are 0.5")
    raise LeftOut(Expected.NO_LABEL, f"the labels are {label_0!r} and {label_1!r}, not 1 and 0")


def _number(label: object) -> float | None:
    try:
        return float(str(label))
    except ValueError:
        return None
