"""The objectives by name: what a command and a model card say of them. Their losses are the functions in `objectives`.

To add an objective, write its function in `objectives` and its line in OBJECTIVES; or give `--objective FILE.py`, a
file that defines `loss(scores, ...) -> (batch,)` as those functions are, and may say GENERATED, METHOD and PAPER.
"""

from pathlib import Path
from typing import Literal, NamedTuple

Generated = Literal["opponent", "data", "none"]


class Objective(NamedTuple):
    """Where the generated side comes from (the opponent draws it, the data set has it, or none is needed), and the
    method's name and arXiv number for model cards: of the paper that gave it, whatever it was made for. A kind of run
    whose cards name another one says so itself. An empty number = no paper."""

    generated: Generated
    method: str
    paper: str


OBJECTIVES = {
    "spin": Objective("opponent", "SPIN", "2401.01335"),
    "space": Objective("opponent", "SPACE", "2512.07175"),
    "ddo": Objective("opponent", "DDO", "2503.01103"),
    "nca": Objective("opponent", "NCA", "2402.05369"),
    "hinge": Objective("opponent", "SPIN with a hinge loss", "2401.01335"),
    "ipo": Objective("opponent", "IPO", "2310.12036"),
    "sspo": Objective("opponent", "SePPO's sign rule", "2410.05255"),
    "kto": Objective("opponent", "KTO", "2402.01306"),
    "mapo": Objective("opponent", "MaPO", "2406.06424"),
    "dro": Objective("opponent", "Diffusion-DRO", "2510.18353"),
    "dpo": Objective("data", "DPO", "2305.18290"),
    "sft": Objective("none", "supervised fine-tuning", "2203.02155"),
}


def is_file(name: str) -> bool:
    """Whether `--objective` names a file, and not one of OBJECTIVES."""
    return name.endswith(".py")


def title_of(name: str) -> str:
    """An objective's name for people, trackers and records: of a file without its folder and ending."""
    return Path(name).stem if is_file(name) else name
