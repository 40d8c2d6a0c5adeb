"""A round's record, `round.json`: what each state of the round has left in it."""

from pathlib import Path
from typing import Any, Literal, TypedDict

from spin_diffusion.store.run_dir import read_json

STATES = ("PLANNED", "OPPONENT", "GENERATED", "CACHED", "TRAINED", "EVALUATED", "PROMOTED")
FINAL = ("PROMOTED", "REJECTED")


class _Planned(TypedDict):
    state: Literal["PLANNED", "OPPONENT", "GENERATED", "CACHED", "TRAINED", "EVALUATED", "PROMOTED", "REJECTED"]
    round: int
    parent: int
    data_hash: str
    files: dict[str, str]
    """SHA-256 of the files that the states have left, by their paths relative to the run's folder."""
    seconds: dict[str, float]


class _Selves(TypedDict):
    hash: str
    members: list[dict[str, Any]]
    anchors: list[dict[str, Any]]


class _Opponent(_Planned):
    opponent: _Selves


class _Training(TypedDict):
    steps: int
    ended_by: dict[str, Any] | None
    anchors: list[dict[str, Any]]
    health: list[dict[str, Any]]


class _Trained(_Opponent):
    training: _Training


class _Evaluated(_Trained):
    metrics: dict[str, Any]
    rejected_because: str | None


class _Promoted(_Evaluated):
    decision: str


_TYPES = dict(zip(STATES, (_Planned, *[_Opponent] * 3, _Trained, _Evaluated, _Promoted), strict=True))


def read_record(directory: Path) -> dict[str, Any]:
    """The record of the round in a folder; empty when there is none yet.

    Raises:
        Damaged: it cannot be read, or lacks what its state has left. Nothing else knows how far the round came.
    """
    path = directory / "round.json"
    if not path.is_file():
        return {}
    remedy = replay(directory)
    record = read_json(path, _Planned, remedy)
    return read_json(path, _TYPES.get(record["state"], _Evaluated), remedy)


def replay(directory: Path) -> str:
    """What can be done when a round has lost what cannot be made again without playing it."""
    numbers = [path.name.removeprefix("round-") for path in directory.parent.glob("round-*")]
    first = int(directory.name.removeprefix("round-"))
    later = sorted({first, *(int(number) for number in numbers if number.isdigit() and int(number) > first)})
    names = " and ".join(f"round-{k}" for k in later)
    return f"delete {names} in {directory.parent} and run the same command again, which plays what is missing anew"
