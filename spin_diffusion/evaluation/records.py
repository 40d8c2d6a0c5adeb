"""What results.json holds, as types: what an evaluation concludes.

results.schema.json is the contract, with the meaning and the range of every field; the types here have the same names,
for whoever writes or reads them. What is said of one model is said at one guidance scale.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

Scale = float | None
"""A guidance scale; None where samples are drawn without one, or were given."""
Role = Literal["truth", "in-domain", "held-out", "alignment", "aesthetics", "drift"]
"""What a score can say: the truth (an oracle of a drawn world); what a preference model thinks that was trained on the
data the player learns from, or one that was trained on other data; agreement with the prompt; beauty, whatever the
prompt; drift, which is good neither up nor down."""
ScorerVerdict = Literal["improved", "inconclusive", "regressed", "drift"]
"""What one scorer says of a model against the baseline."""
ModelVerdict = Literal["improved", "inconclusive", "regressed", "suspect"]
"""What all scorers and alarms together say of it."""
AlarmState = Literal["ok", "warn", "alarm", "not run"]
"""State of an alarm: nothing seen; worth a look; believe no verdict before it is explained; could not be computed."""
ModelRole = Literal["baseline", "round", "rival", "candidate"]
ModelKind = Literal["pipeline", "model", "round", "images"]
Aggregate = Literal["mean", "best_of_k", "best_by_average"]
PartedBy = Literal["category", "prompt length"]


class PromptSetEntry(TypedDict):
    """The prompts of a protocol."""

    name: str
    sha256: str
    num_prompts: int
    licence: str
    source: str


class Sampling(TypedDict):
    """How answers are drawn."""

    temperature: float
    top_p: float
    top_k: int | None
    max_new_tokens: int


class Protocol(TypedDict):
    """What must be equal for two results to be comparable; `id` is its hash."""

    id: str
    prompt_set: PromptSetEntry
    seed: int
    seed_rule: str
    images_per_prompt: NotRequired[int]
    sampler: NotRequired[str]
    num_inference_steps: NotRequired[int | None]
    guidance_scales: NotRequired[list[Scale]]
    resolution: NotRequired[int | None]
    eta: NotRequired[float | None]
    precision: NotRequired[str | None]
    size_condition: NotRequired[str | None]
    answers_per_prompt: NotRequired[int]
    sampling: NotRequired[Sampling]
    references_sha256: NotRequired[str]


class Headline(TypedDict):
    """What the verdict at the top of the page is about; no model = the baseline alone."""

    model: str | None
    guidance_scale: Scale


class ModelEntry(TypedDict):
    """A model that was evaluated, and where it came from."""

    name: str
    role: ModelRole
    round: int | None
    source: str
    kind: ModelKind
    base: str | None
    weights_sha256: str | None


class CountEntry(TypedDict):
    """How many samples a model was asked for, how many of them are missing, unscored or broken, and what that costs."""

    model: str
    guidance_scale: Scale
    asked: int
    missing: int
    unscored: int
    broken: int
    prompts_lost: int


class ScorerEntry(TypedDict):
    """A scorer or judge that was asked for; `reason` says why it was not run."""

    name: str
    title: str
    state: Literal["run", "not run"]
    reason: str
    scale: str
    role: Role
    source: str
    checkpoint: dict[str, str]
    key: NotRequired[str]
    preprocessing: str
    text: str
    licence: str
    citation: str
    truncated_prompts: int


class AggregateEntry(TypedDict):
    """The mean over prompts of one model by one scorer, or another aggregate of its samples."""

    model: str
    scorer: str
    guidance_scale: Scale
    aggregate: Aggregate
    num_prompts: int
    mean: float
    low: float
    high: float
    sd: float


class ComparisonEntry(TypedDict):
    """The paired difference of a model to another (`baseline`) by one scorer."""

    model: str
    baseline: str
    scorer: str
    guidance_scale: Scale
    num_prompts: int
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_rate_low: NotRequired[float]
    win_rate_high: NotRequired[float]
    p: float
    p_holm: float
    verdict: ScorerVerdict


class PlaceEntry(TypedDict):
    """A model's place in a ranking."""

    model: str
    place: int
    better_than: list[str]
    worse_than: list[str]


class RankingEntry(TypedDict):
    """Who wins of three models or more."""

    guidance_scale: Scale
    scorers: list[str]
    winner: str | None
    sentence: str
    places: list[PlaceEntry]


class VerdictEntry(TypedDict):
    """What is concluded of one model."""

    model: str
    guidance_scale: Scale
    verdict: ModelVerdict
    reason: str


class AlarmEntry(TypedDict):
    """What one alarm says of one model."""

    id: str
    model: str
    guidance_scale: Scale
    state: AlarmState
    value: float | None
    threshold: float | None
    explanation: str


class PartEntry(TypedDict):
    """The paired difference within a part of the prompts; too few prompts have no interval."""

    by: PartedBy
    value: str
    model: str
    scorer: str
    guidance_scale: Scale
    num_prompts: int
    difference: float
    low: float | None
    high: float | None


class FailureEntry(TypedDict):
    """A sample that is missing, broken or not scored."""

    model: str
    guidance_scale: Scale
    id: str
    prompt: str
    what: str


class CurveEntry(TypedDict):
    """A point of a training curve; None = not finite."""

    model: str
    round: int
    step: int
    r_real: float | None
    r_generated: float | None
    loss: NotRequired[float | None]


class MeasureEntry(TypedDict):
    """What else was measured of a model."""

    model: str
    round: int | None
    name: str
    title: str
    value: float | None
    low: float | None
    high: float | None
    better: Literal["higher", "lower", "none"]


class EventEntry(TypedDict):
    """What a rule of health said of training."""

    model: str
    round: int
    step: int
    rule: str
    action: Literal["warn", "stop", "roll_back"]
    sentence: str
    weights_from_step: int | None


class LedgerEntry(TypedDict):
    """What a phase of a round took; None = not known."""

    model: str
    round: int
    phase: Literal["generated", "cached", "probed", "trained", "evaluated", "overhead"]
    seconds: float
    predicted_seconds: float | None
    samples: int | None
    samples_per_second: float | None
    flops: int | None
    matrix_share: float | None
    peak_memory_bytes: int | None
    predicted_memory_bytes: NotRequired[int | None]
    disk_bytes: NotRequired[int | None]
    predicted_disk_bytes: NotRequired[int | None]


class OfTraining(TypedDict, total=False):
    """What is told of training beside the models' samples."""

    curves: Sequence[Mapping[str, Any]] | None
    """{"model", "round", "step", "r_real", "r_generated"} and other numbers, by step."""
    measures: Sequence[Mapping[str, Any]] | None
    """{"model", "round", "name", "title", "value", "low", "high", "better": "higher", "lower" or "none"}, what else was
    measured; low and high may be None."""
    events: Sequence[Mapping[str, Any]] | None
    """{"model", "round", "step", "rule", "action", "sentence", "weights_from_step" or None}, what the rules of health
    said."""
    ledger: Sequence[Mapping[str, Any]] | None
    """What each phase of each round took, as in the schema."""


class TrainingEntries(TypedDict, total=False):
    """What results.json says of training; what is empty is not there."""

    training_curves: list[CurveEntry]
    measures: list[MeasureEntry]
    training_events: list[EventEntry]
    ledger: list[LedgerEntry]


class Results(TrainingEntries):
    """All of results.json."""

    schema_version: int
    title: str
    protocol: Protocol
    baseline: str
    headline: Headline
    models: list[ModelEntry]
    samples: NotRequired[list[CountEntry]]
    scorers: list[ScorerEntry]
    results: list[AggregateEntry]
    comparisons: list[ComparisonEntry]
    between_others: NotRequired[list[ComparisonEntry]]
    ranking: NotRequired[list[RankingEntry]]
    verdicts: list[VerdictEntry]
    alarms: list[AlarmEntry]
    breakdowns: list[PartEntry]
    failures: list[FailureEntry]
    environment: dict[str, str]
