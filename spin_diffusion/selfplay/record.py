"""A round's record, `round.json`: what each state of the round has left in it."""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from spin_diffusion.samples.sample import CHOICES, ENCODED
from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.input_error import InputError, printable
from spin_diffusion.store.run_dir import Damaged

State = Literal["PLANNED", "OPPONENT", "GENERATED", "CACHED", "TRAINED", "EVALUATED", "PROMOTED", "REJECTED"]
STATES: tuple[State, ...] = get_args(State)[:-1]
"""In order; the last one is REJECTED in place of PROMOTED where the player is set aside."""
FINAL: tuple[State, ...] = ("PROMOTED", "REJECTED")

SAMPLES, SCORES = "samples", "scores"
"""Folders of a round, and of `held_out` in it, with a file for each shard of samples, as ENCODED and CHOICES."""
HELD_OUT, EVALUATION, EMA, JUDGED, PREVIEWS = "held_out", "evaluation", "ema", "judged", "previews"
"""Other folders of a round."""
PREVIEW_SHEET = "previews.png"
"""All previews of a round in one picture."""
BEST = "best"
"""Folder of the best player so far, while a round is trained."""


COUNTED = ("generated", "cached", "probed", "trained", "judged", "previewed", "evaluated")
"""Phases that do a round's work; the rest of its time is overhead."""


class SelfRecord(TypedDict):
    """One self that plays the opponent."""

    round: int
    """0 = the base."""
    weight: float
    hash: str


class OpponentRecord(TypedDict):
    """Who the opponent of a round is."""

    rule: str
    round: int
    """The newest self that anchors the scores."""
    hash: str
    """The hash of the one that draws, or of the mixture."""
    members: list[SelfRecord]
    anchors: list[SelfRecord]


class FindingRecord(TypedDict):
    """What a rule of health said."""

    step: int
    rule: str
    action: str
    sentence: str


class EndRecord(TypedDict):
    """The rule of health that ended a round, and the step whose player was kept."""

    rule: str
    action: str
    sentence: str
    kept_step: int


Better = Literal["higher", "lower"]


class StepValue(TypedDict):
    """How the judgement of a step's player differs from that of the round's start, with the 95 % interval; mean is None
    where it spoilt a sample."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


class SelectionState(TypedDict):
    """What a checkpoint holds of the judgements so far."""

    key: str
    """What decides a judgement."""
    start: list[float | None]
    """The judge's values of the player of the round's start."""
    curve: list[StepValue]


class SelectionRecord(TypedDict):
    """The judgements of a round, and the step whose player was kept; None = that which training ended with."""

    by: str
    better: Better
    step: int | None
    curve: list[StepValue]


class TrainingRecord(TypedDict):
    """What training came to; the means over the last steps stand beside these, by the names of `step_metrics`."""

    steps: int
    resumed_from: int
    stopped_early: bool
    health: list[FindingRecord]
    ended_by: EndRecord | None
    distance: float | None
    selection: NotRequired[SelectionRecord]
    loss: float
    r_real: float
    r_generated: float
    margin: float
    implicit_accuracy: float
    saturation: float
    score_real: float
    score_generated: float


class GapRecord(TypedDict):
    """The held-out gap with its 95 % interval, in the loss's unit; low and high are None where there is none."""

    mean: float
    low: float | None
    high: float | None
    r_real: float
    r_generated: float
    num_samples: int


class LedgerEntry(TypedDict):
    """What a phase took; None where it is not known."""

    seconds: float
    samples: int | None
    """Those of all processes."""
    samples_per_second: float | None
    flops: int | None
    matrix_share: float | None
    """Share of the measured rate of all devices' large matrix products, in [0, 1]: MFU, without what gradient
    checkpointing computes again."""
    peak_memory_bytes: int
    """This process's: torch's peak of the phase on a GPU, the resident memory's peak so far on a CPU."""
    disk_bytes: int | None
    """That the run's folder held afterwards."""


class Share(TypedDict):
    """What one process did of a phase."""

    seconds: float
    """That it worked, and did not wait for the others at the end of shared work. In a step of training nobody knows who
    waits for whom."""
    samples: int | None


class RoundFields(TypedDict, total=False):
    """What the states after PLANNED leave in the record."""

    ledger: dict[str, LedgerEntry]
    """By the phase."""
    shares: dict[str, list[Share]]
    """By the phase, what each of several processes did, in their order."""
    opponent: OpponentRecord
    generated: Literal["opponent", "data", "none"]
    """Where the generated sides come from."""
    visits: int
    """The number of pairs, at the first places of the round's stream, whose generated side the opponent drew."""
    drawn: dict[str, int]
    """Samples to train on that each self drew, by its round."""
    candidates: dict[str, Any]
    shortcut: dict[str, Any]
    training: TrainingRecord
    beta: float
    held_out_gap: GapRecord
    metrics: dict[str, Any]
    rejected_because: str | None
    learnt: bool
    decision: Literal["promoted", "rejected"]
    weights_removed_after: int
    """The round after which the player's weights were removed, as --keep_rounds asks for; absent while they are kept.
    It stands here before the first file goes."""


class RoundRecord(RoundFields):
    """The content of `round.json`."""

    state: State
    round: int
    parent: int
    """The round whose player this one went on with; 0 = the base."""
    data_hash: str
    files: dict[str, str]
    """SHA-256 of the files that the states have left, by their paths relative to the run's folder."""
    seconds: dict[str, float]


_LEFT_BY: dict[State, tuple[str, ...]] = {
    "OPPONENT": ("opponent",),
    "TRAINED": ("training",),
    "EVALUATED": ("metrics", "rejected_because"),
    "PROMOTED": ("decision",),
}
"""What nothing else knows, by the state that has left it."""


def find_record(directory: Path) -> RoundRecord | None:
    """As `read_record`; None when there is none yet."""
    return read_record(directory) if (directory / "round.json").is_file() else None


def read_record(directory: Path) -> RoundRecord:
    """The record of the round in a folder.

    Raises:
        Damaged: it cannot be read, or lacks what its state has left. Nothing else knows how far the round came.
    """
    path = directory / "round.json"
    record: RoundRecord = read_json(path, RoundRecord, replay(directory))
    for state, names in _LEFT_BY.items():
        if missing := [name for name in names if has_reached(record, state) and name not in record]:
            raise Damaged(path, f"{missing[0]} is missing", replay(directory))
    return record


def write_record(directory: Path, record: RoundRecord) -> None:
    """Replace the record of the round in a folder, which commits the state that it names."""
    write_json(directory / "round.json", record, sealed=True)


def has_reached(record: RoundRecord, state: State) -> bool:
    """Whether the round has committed this state, or a later one."""
    return record["state"] in FINAL or STATES.index(state) <= STATES.index(record["state"])


def made_in(name: str) -> State:
    """The state that makes the file of a name in a record, such as round-1/held_out/samples/00000-of-00001.parquet."""
    inside = Path(name).parts[1:]
    folder = inside[1] if inside[0] == HELD_OUT else inside[0]
    if folder in (SAMPLES, CHOICES):
        return "GENERATED"
    return "CACHED" if folder in (ENCODED, SCORES) else "TRAINED"


def check_weights(folder: Path) -> None:
    """InputError when a folder, or the one that it lies in, is that of a round whose weights were removed."""
    for directory in (folder, folder.parent):
        try:
            after = read_json(directory / "round.json", _Removed).get("weights_removed_after")
        except Damaged:  # or there is none
            continue
        if after is not None:
            raise InputError(
                f"{printable(directory)}: its weights were removed when round {after} was finished, as --keep_rounds "
                "asked for: take a later round, or play the run again in another --output_dir with more --keep_rounds"
            )


class _Removed(TypedDict):
    weights_removed_after: NotRequired[int]


def weights_of(record: RoundRecord) -> set[str]:
    """The files of a trained player, and of what was trained beside it, by their paths in the run's folder."""
    return {name for name in record["files"] if made_in(name) == "TRAINED"}


def saved_names(directory: Path, record: RoundRecord) -> list[str]:
    """Top-level names in the round's folder that the game wrote of the player, as users load it."""
    prefix = f"{directory.name}/"
    names = {name.removeprefix(prefix).split("/")[0] for name in record["files"] if name.startswith(prefix)}
    return sorted(names - {SAMPLES, CHOICES, ENCODED, SCORES, HELD_OUT, EMA, EVALUATION, JUDGED, PREVIEWS})


def replay(directory: Path) -> str:
    """What can be done when a round has lost what cannot be made again without playing it."""
    numbers = [path.name.removeprefix("round-") for path in directory.parent.glob("round-*")]
    first = int(directory.name.removeprefix("round-"))
    later = sorted({first, *(int(number) for number in numbers if number.isdigit() and int(number) > first)})
    names = " and ".join(f"round-{k}" for k in later)
    return f"delete {names} in {directory.parent} and run the same command again, which plays what is missing anew"
