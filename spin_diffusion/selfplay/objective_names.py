"""The objectives by name: what a command and a model card say of them. Their losses are the functions in `objectives`.

To add an objective, write its function in `objectives` and its line in OBJECTIVES; or give `--objective FILE.py`, a
file that defines `loss(scores, ...) -> (batch,)` as those functions are, and may say GENERATED, METHOD and PAPER.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import code_hash
from spin_diffusion.store.named import load_module

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


def objective_of(name: str) -> Objective:
    """What is known of an objective; InputError for a file that cannot be imported or says what cannot be."""
    if not is_file(name):
        return OBJECTIVES[name]
    module = load_module(__name__, name)
    generated: Any = getattr(module, "GENERATED", "opponent")
    if generated not in get_args(Generated):
        raise InputError(f"{name}: GENERATED is {generated!r}: give one of {', '.join(get_args(Generated))}")
    return Objective(generated, str(getattr(module, "METHOD", title_of(name))), str(getattr(module, "PAPER", "")))


def file_hashes(names: list[str]) -> dict[str, str]:
    """The content of the files among some objectives, with what lies beside them and is imported, by path."""
    return {name: code_hash(Path(name)) for name in names if is_file(name)}
