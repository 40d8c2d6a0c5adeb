"""results.json: what it holds, as types, and its one reader, which trusts nothing in it.

It is everything that the report page shows, but for pictures, answers and single scores, which lie beside it: a row for
each sample and scorer in scores.parquet, a row for each sample in images.parquet or answers.parquet. What is said of
one model is said at one guidance scale. Intervals are 95 % Student's t over prompts, for win rates Clopper and
Pearson's. The words and facts in which images and answers differ are a `Modality`; what the page says and shows of each
is in report/editions.py.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, NotRequired, TypedDict

from spin_diffusion.store.input_error import InputError, one_line, read_bytes
from spin_diffusion.store.typed import Misfit, fit

SCHEMA_VERSION = 1
_MAX_BYTES = 1 << 30
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
FailOn = Literal["inconclusive", "suspect", "regressed"]
"""The best verdict that is called a failure, for `--fail_on`."""
AlarmState = Literal["ok", "warn", "alarm", "not run"]
"""State of an alarm: nothing seen; worth a look; believe no verdict before it is explained; could not be computed."""
Metric = Literal["fd", "kid", "precision", "recall", "density", "coverage"]
"""What is measured of the distribution of a model's pictures, see `distribution`."""
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
    precision: NotRequired[str | None]
    size_condition: NotRequired[str | None]
    prediction_scale: NotRequired[float | None]
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
    strength: NotRequired[float | None]
    """How far a round is gone from its base to its player; None = it is no round."""


class _Said(TypedDict):
    """What is said of one model at one guidance scale."""

    model: str
    guidance_scale: Scale


class CountEntry(_Said):
    """How many samples a model was asked for; of those how many are missing, how many are there but not scored by every
    scorer, and how many are there but broken (of one colour, empty), which count with their scores; and how many
    prompts are left out for every model as this one lacks a sample or a score of them."""

    asked: int
    missing: int
    unscored: int
    broken: int
    prompts_lost: int


class ScorerRecord(TypedDict):
    """What is known of a scorer or judge that was asked for; `reason` says why it was not run."""

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


class ScorerEntry(ScorerRecord):
    """The same, and how many prompts were longer than what it reads."""

    truncated_prompts: int


class AggregateEntry(_Said):
    """The mean over prompts of one model by one scorer, or another aggregate of its samples."""

    scorer: str
    aggregate: Aggregate
    num_prompts: int
    mean: float
    low: float
    high: float
    sd: float


class ComparisonEntry(_Said):
    """The paired difference of a model to another (`baseline`) by one scorer, by the mean over samples.

    Wins and losses count prompts; one that only the model ahead has lost counts against it, and ties are half a win. p
    is the larger p-value of the sign test and the paired t-test, both two-sided; p_holm is adjusted over all rows of
    its list."""

    baseline: str
    scorer: str
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
    """A model's place in a ranking: 1 + the number of models that are better."""

    model: str
    place: int
    better_than: list[str]
    worse_than: list[str]


class RankingEntry(TypedDict):
    """Who wins of three models or more, by the scorers that decide: those that know the truth, else the held-out ones.
    One is better than another if the rule of the verdict, without alarms, calls it improved."""

    guidance_scale: Scale
    scorers: list[str]
    winner: str | None
    sentence: str
    places: list[PlaceEntry]


class VerdictEntry(_Said):
    """What is concluded of one model."""

    verdict: ModelVerdict
    reason: str


class AlarmEntry(_Said):
    """What one alarm says of one model."""

    id: str
    state: AlarmState
    value: float | None
    threshold: float | None
    explanation: str


class PartEntry(_Said):
    """The paired difference within a part of the prompts; fewer than 20 have no interval. The intervals of one model by
    one scorer hold together at 95 %."""

    by: PartedBy
    value: str
    scorer: str
    num_prompts: int
    difference: float
    low: float | None
    high: float | None


class FailureEntry(_Said):
    """A sample that is missing, broken or not scored."""

    id: str
    prompt: str
    what: str


class DistanceEntry(_Said):
    """A metric of the distribution of a model's pictures; of the baseline there is no difference."""

    metric: Metric
    better: Literal["higher", "lower"]
    value: float
    low: float
    high: float
    difference: NotRequired[float]
    difference_low: NotRequired[float]
    difference_high: NotRequired[float]


class DistributionEntry(TypedDict):
    """What the models' pictures were compared with, in which features, and what came out."""

    embedding: str
    title: str
    source: str
    checkpoint: dict[str, str]
    width: int
    real: str
    num_real: int
    num_images: int
    left_out: str
    distances: list[DistanceEntry]


class CurveEntry(TypedDict):
    """A point of a training curve: means over the batch of a step, or over a window of steps that ends there; None =
    not finite."""

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
    """What a rule of health said of training; of one that ended the round also the step whose weights were kept."""

    model: str
    round: int
    step: int
    rule: str
    action: Literal["warn", "stop", "roll_back"]
    sentence: str
    weights_from_step: int | None


class SelectionEntry(TypedDict):
    """How the judgement of a step's player differs from that of its round's start; None = it spoilt a sample."""

    model: str
    round: int
    by: str
    better: NotRequired[Literal["lower", "higher"]]
    """Higher where an older program left it out."""
    step: int
    value: float | None
    low: float | None
    high: float | None
    chosen: bool


class PreviewEntry(TypedDict):
    """The previews of a round, in one picture."""

    model: str
    round: int
    file: str


class LedgerEntry(TypedDict):
    """What a phase of a round took, beside what `plan` predicted; None = not known. `samples` are those of
    all processes, `matrix_share` is of the FLOP/s of large matrix products, memory is that of one process."""

    model: str
    round: int
    phase: Literal["generated", "cached", "probed", "trained", "judged", "previewed", "evaluated", "overhead"]
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


class DifferenceEntry(TypedDict):
    """A paired difference with its 95 % interval over prompts."""

    difference: float
    low: float
    high: float


class FreeSettings(TypedDict):
    """Settings of a sampler that are free to choose, and the passes of the denoiser that a picture costs with them."""

    guidance_scale: float
    num_inference_steps: int
    prediction_scale: float
    passes: int


class SweptSetting(FreeSettings):
    """What settings of a sampler scored."""

    mean: float


class SweepEntry(TypedDict):
    """What a sweep of a model's sampler says: all settings, the default first, on the prompts that choose; what the
    chosen one (its place) gains over the default on the other prompts; and to the baseline at its own chosen one."""

    model: str
    scorer: str
    """fd where the distance to real pictures chose."""
    better: NotRequired[Literal["lower", "higher"]]
    """Higher where an older program left it out."""
    baseline: str | None
    num_selection: int
    num_held_out: int
    settings: list[SweptSetting]
    chosen: int
    gain: DifferenceEntry
    to_baseline: DifferenceEntry | None


class OfTraining(TypedDict, total=False):
    """What is told of training beside the models' samples, as in the entries of these names."""

    curves: Sequence[Mapping[str, Any]] | None
    """By step; other numbers may stand beside those of a `CurveEntry`."""
    measures: Sequence[Mapping[str, Any]] | None
    events: Sequence[Mapping[str, Any]] | None
    selection: Sequence[Mapping[str, Any]] | None
    previews: Sequence[Mapping[str, Any]] | None
    ledger: Sequence[Mapping[str, Any]] | None


class TrainingEntries(TypedDict, total=False):
    """What results.json says of training; what is empty is not there."""

    training_curves: list[CurveEntry]
    measures: list[MeasureEntry]
    training_events: list[EventEntry]
    selection: list[SelectionEntry]
    previews: list[PreviewEntry]
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
    distribution: NotRequired[DistributionEntry]
    alarms: list[AlarmEntry]
    breakdowns: list[PartEntry]
    failures: list[FailureEntry]
    sweep: NotRequired[list[SweepEntry]]
    environment: dict[str, str]


# Images and answers


@dataclass(frozen=True)
class Modality:
    """What the models make; a guidance scale is part of names and tables only where samples are drawn with one."""

    plural: str
    """Name of the samples, and of their table."""
    at: str
    """Format that says where, behind a name: of the guidance scale in words."""
    at_key: str
    """Format of the same behind the name of a metric."""
    heading: str
    """Format of the heading of a column of means: of the guidance scale in words."""
    columns: tuple[str, ...]
    """Columns that tell apart the rows of one model."""
    held_out: str
    """What speaks for a held-out scorer."""


IMAGES = Modality("images", " at {}", "@{}", "{}", ("guidance",), "not trained on the same preferences")
ANSWERS = Modality("answers", "", "", "mean", (), "which is held out")


def modality_of(protocol: Protocol) -> Modality:
    """What was asked for: a protocol of answers has `sampling`."""
    return ANSWERS if "sampling" in protocol else IMAGES


def samples_per_prompt(protocol: Protocol) -> int:
    """Images or answers of each prompt."""
    return protocol["answers_per_prompt"] if "sampling" in protocol else protocol["images_per_prompt"]


def guidance_scales(protocol: Protocol) -> list[Scale]:
    """Those that are compared; where samples are drawn without one it is None."""
    return protocol["guidance_scales"] if "guidance_scales" in protocol else [None]


def scale_in_words(guidance_scale: Scale) -> str:
    """A guidance scale in a sentence."""
    return "pictures as given" if guidance_scale is None else f"guidance {guidance_scale:g}"


# Reading


def read_results(path: Path) -> Results:
    """The content of results.json.

    Raises:
        InputError: no such file, not JSON, another schema version, not of the type `Results`, or a name that it does
            not explain itself.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: give the folder of a finished evaluation")
    data = read_bytes(path, _MAX_BYTES)
    try:
        # utf-8-sig: an editor may have put a byte order mark in front
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise InputError(f"{path} is not JSON ({one_line(error)})") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path} has schema_version {one_line(json.dumps(version))}, this program reads {SCHEMA_VERSION}: "
            "evaluate again, or use the version of the program that wrote it"
        )
    try:
        results: Results = fit(content, Results)
        _check_protocol(results["protocol"])
    except Misfit as error:
        raise InputError(f"{path} is not what an evaluation writes: {error}") from None
    _check_names(path, results)
    return results


def _check_protocol(protocol: Protocol) -> None:
    """Misfit where it is neither of pictures nor of answers."""
    of_answers = ("answers_per_prompt", "sampling")
    of_pictures = ("images_per_prompt", "sampler", "num_inference_steps", "guidance_scales", "resolution")
    needed, foreign = (of_answers, of_pictures) if "sampling" in protocol else (of_pictures, of_answers)
    if missing := [key for key in needed if key not in protocol]:
        raise Misfit(f"protocol.{missing[0]} is missing")
    if odd := [key for key in foreign if key in protocol]:
        raise Misfit(f"protocol.{odd[0]} stands beside {needed[0]}")
    if samples_per_prompt(protocol) < 1 or not guidance_scales(protocol):
        raise Misfit("protocol asks for no samples")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _check_names(path: Path, results: Results) -> None:
    """What types cannot say: names are there once, and the baseline and the headline are among the models."""
    models = [model["name"] for model in results["models"]]
    for kind, names in (("model", models), ("scorer", [scorer["name"] for scorer in results["scorers"]])):
        if repeated := _first_repeated(names):
            raise InputError(f"{path} has the {kind} {one_line(repr(repeated))} twice")
    for role, name in (("baseline", results["baseline"]), ("headline", results["headline"]["model"])):
        if name is not None and name not in models:
            raise InputError(f"{path}: the {role} {one_line(repr(name))} is not among the models")


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)
