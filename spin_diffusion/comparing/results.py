"""What comparison.json holds."""

from typing import Any, Literal, NotRequired, TypedDict

from spin_diffusion.comparing.settings import Budget, Mode, SetName
from spin_diffusion.evaluation.records import FreeSettings, Metric


class Mean(TypedDict):
    """A mean over seeds and prompts, with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: dict[str, float]
    """The mean of each seed."""


class Difference(Mean):
    """A paired difference."""

    adjusted: NotRequired[list[float] | None]
    """The interval that all differences of the table have together at 95 %."""


Means = dict[Mode, Mean | None]
Differences = dict[Mode, Difference | None]


class Measured(TypedDict):
    """What the pictures of one round of some cells are."""

    scores: Means
    other_scores: dict[str, Means]
    """Scorer -> its scores, of all but the first."""
    diversity: Mean | None


class BaseResult(Measured):
    """The base of a world."""

    best: FreeSettings | None
    free_gain: Differences
    """What its best settings gain over the others, without any training."""
    failures: list[str]


class CurvePoint(TypedDict):
    """A round on validation prompts."""

    round: int
    mean: float
    seeds: list[float]


class RoundResult(TypedDict):
    """A round on test prompts."""

    round: int
    scores: Means
    to_base: Differences
    to_reference: NotRequired[Differences]


class MethodResult(TypedDict):
    """A row of a table: a method in a world under a budget. One that failed has no scores."""

    method: str
    about: str
    state: Literal["ok", "partly", "failed"]
    seeds: list[int]
    failures: list[str]
    rounds: int | None
    steps_per_round: int
    choice: dict[str, float] | None
    """A `ChosenRate`."""
    best: FreeSettings | None
    rates: dict[str, dict[str, float] | None]
    """Learning rate -> drawn how -> mean on validation prompts."""
    scores: NotRequired[Means]
    other_scores: NotRequired[dict[str, Means]]
    diversity: NotRequired[Mean | None]
    to_base: NotRequired[Differences]
    to_reference: NotRequired[Differences]
    gflops: NotRequired[float]
    seconds: NotRequired[float]
    steps: NotRequired[float]
    curve: NotRequired[list[CurvePoint]]
    best_round: NotRequired[int]
    drift: NotRequired[float | None]
    """What the last round lost of the best one."""
    at_best_round: NotRequired[Means]
    best_round_to_reference: NotRequired[Differences]
    by_round: NotRequired[list[RoundResult]]


class First(TypedDict):
    """The method with the highest mean."""

    method: str
    not_told_apart: list[str]


class DistanceRow(TypedDict):
    """How far a method's pictures, drawn in one way, are from real ones; the base has no difference to itself at its
    best."""

    method: str
    mode: Mode
    metrics: dict[Metric, Mean]
    to_base: dict[Metric, Difference]


class Distances(TypedDict):
    """How far the pictures of all methods are from real ones."""

    title: str
    num_real: int
    num_images: int
    """Pictures of each method, way of drawing and seed."""
    left_out: str
    """Which metrics are not there, and why; empty = all are."""
    rows: list[DistanceRow]


class BudgetResult(TypedDict):
    """All methods of a world under one budget."""

    budget: Budget
    total_steps: int
    rows: list[MethodResult]
    differences: int
    """How many there are, for which their adjusted intervals hold together."""
    first: dict[Mode, First | None]
    distances: NotRequired[Distances]


class WorldResult(TypedDict):
    """A world."""

    name: str
    about: str
    usual: FreeSettings
    num_free: int
    """Settings of the sampler from which the best were chosen."""
    base: BaseResult
    budgets: list[BudgetResult]


class PromptCount(TypedDict):
    """A set of prompts."""

    num: int
    sha256: str


class TookAll(TypedDict):
    """What all runs together took."""

    runs: int
    seconds: float
    cpu_seconds: float


class Comparison(TypedDict):
    """What comparison.json holds."""

    settings: dict[str, Any]
    scorer: str
    scorers: dict[str, str]
    """Name -> title."""
    seeds: list[int]
    prompts: dict[SetName, PromptCount]
    worlds: list[WorldResult]
    took: TookAll | None
