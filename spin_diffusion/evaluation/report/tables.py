"""What the tables of the page say beyond the entries of results.json, which the template sets itself.

To add a section: its content in `_sections` of the package's `__init__`, its markup in page.html.j2.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from spin_diffusion.evaluation.breakdowns import MIN_PROMPTS
from spin_diffusion.evaluation.records import (
    Aggregate,
    AggregateEntry,
    AlarmEntry,
    ComparisonEntry,
    ModelEntry,
    PartEntry,
    RankingEntry,
    Results,
    Scale,
    ScorerEntry,
)
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.labels import Labels, mark
from spin_diffusion.evaluation.report.wording import MAX_LISTED, STATES, Number, State, direction, signed

MAX_PARTS = 40
_HALF_WIDTH_CHARACTERS = 52  # of numbers, in a table of half the page's width
_GRAVITY = ("alarm", "warn", "ok", "not run")
_Entry = TypeVar("_Entry", AggregateEntry, ComparisonEntry)


@dataclass(frozen=True)
class HeadlineRow:
    """What one scorer says of the headline's model; of a scorer that was not run there is nothing but its entry."""

    scorer: ScorerEntry
    baseline: Number | None
    candidate: Number | None
    comparison: ComparisonEntry | None
    difference: Number | None
    mark: State | None
    """Set where the difference is significant."""

    @property
    def verdict(self) -> State | None:
        """The verdict as the page shows it: a drift that is not significant is inconclusive."""
        return (self.mark or STATES["inconclusive"]) if self.comparison else None


@dataclass(frozen=True)
class ModelCell:
    """One model at one guidance scale by one scorer."""

    mean: Number | None
    difference: Number | None
    mark: State | None
    """Set where the difference is significant."""


@dataclass(frozen=True)
class ModelTable:
    """All models by one scorer, or one aggregate of them."""

    scorer: ScorerEntry
    scales: list[Scale]
    rows: list[tuple[ModelEntry, list[ModelCell]]]
    wide: bool
    """Too wide to stand beside another table."""


@dataclass(frozen=True)
class PartRow:
    """The difference within a part of the prompts."""

    part: PartEntry
    too_few: bool
    bar: Markup


@dataclass(frozen=True)
class PartTable:
    """The breakdown by one scorer."""

    scorer: ScorerEntry
    digits: int
    domain: tuple[str, str]
    groups: dict[str, list[PartRow]]
    """Kind of the parts, such as category -> its parts."""


def headline_rows(results: Results) -> list[HeadlineRow]:
    """The headline's table: every scorer that was asked for, run or not."""
    candidate, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    labels, means, compared = Labels(results), _means(results, "mean"), comparisons(results)
    rows = []
    for scorer in results["scorers"]:
        baseline = labels.mean(means.get((results["baseline"], scorer["name"], scale)))
        ours = comparison = None
        if candidate is not None:
            ours = labels.mean(means.get((candidate, scorer["name"], scale)))
            comparison = compared.get((candidate, scorer["name"], scale))
        row = HeadlineRow(scorer, baseline, ours, comparison, labels.difference(comparison), mark(comparison))
        rows.append(row)
    return rows


def model_tables(results: Results) -> list[ModelTable]:
    """Every model at every guidance scale, a table per scorer; none where the headline's table says it all."""
    if len(results["models"]) <= 2 and len(Labels(results).scales) == 1:
        return []
    return aggregate_tables(results, "mean")


def aggregate_tables(results: Results, aggregate: Aggregate) -> list[ModelTable]:
    """Every model at every guidance scale by an aggregate; a table per scorer that has it."""
    labels, means = Labels(results), _means(results, aggregate)
    compared = comparisons(results) if aggregate == "mean" else {}
    tables = []
    for scorer in labels.ran:
        name, rows, widest = scorer["name"], [], 0
        scales = [s for s in labels.scales if any((m["name"], name, s) in means for m in results["models"])]
        for model in results["models"][:MAX_LISTED]:
            keys = [(model["name"], name, scale) for scale in scales]
            if not any(key in means for key in keys):
                continue
            cells = [
                ModelCell(labels.mean(means.get(key)), labels.difference(compared.get(key)), mark(compared.get(key)))
                for key in keys
            ]
            numbers = [number for cell in cells for number in (cell.mean, cell.difference) if number]
            widest = max(widest, *(len(number.value) + 1 + len(number.interval) for number in numbers))
            rows.append((model, cells))
        if rows:
            tables.append(ModelTable(scorer, scales, rows, widest * len(scales) > _HALF_WIDTH_CHARACTERS))
    return tables


def rankings(results: Results) -> list[tuple[RankingEntry, list[ComparisonEntry]]]:
    """Who wins at each guidance scale, that of the headline first, with the pairs without the baseline by the scorers
    that decide; none for two models."""
    scale = results["headline"]["guidance_scale"]
    return [
        (
            ranking,
            [
                pair
                for pair in results.get("between_others", [])
                if pair["guidance_scale"] == ranking["guidance_scale"] and pair["scorer"] in ranking["scorers"]
            ],
        )
        for ranking in sorted(results.get("ranking", []), key=lambda ranking: ranking["guidance_scale"] != scale)
    ]


def curve_panels(results: Results) -> list[plots.Panel]:
    """Paired differences over the rounds, a panel per scorer; none for fewer than two rounds."""
    rounds = {m["name"]: m["round"] for m in results["models"] if m["role"] == "round" and m["round"] is not None}
    base_round = next((m["round"] for m in results["models"] if m["name"] == results["baseline"]), None)
    if len(set(rounds.values()) | ({base_round} - {None})) < 2 or len(set(rounds.values())) < len(rounds):
        return []  # a round that is there twice belongs to two runs: one line would join what does not belong together
    labels, compared, panels = Labels(results), comparisons(results), []
    for number, scorer in enumerate(labels.ran):
        lines = []
        for style, scale in enumerate(labels.scales):
            points = [] if base_round is None else [(base_round, 0.0, 0.0, 0.0)]
            points += [
                (round_, c["difference"], c["low"], c["high"])
                for model, round_ in rounds.items()
                if (c := compared.get((model, scorer["name"], scale)))
            ]
            if len(points) > 1:
                columns = [list(column) for column in zip(*sorted(points), strict=True)]
                lines.append(plots.Line(style, *columns))
        if lines:
            chart = plots.round_curves(f"curve-{number}", "Difference to the baseline over the rounds", lines)
            role = scorer["role"]
            panels.append(plots.Panel(labels.title(scorer["name"]), chart, role, direction(role)))
    return panels


def alarm_rows(results: Results) -> tuple[list[AlarmEntry], list[AlarmEntry]]:
    """The alarms of the headline's model and guidance scale, and all others; the gravest first."""
    headline = (results["headline"]["model"], results["headline"]["guidance_scale"])
    alarms = sorted(results["alarms"], key=lambda alarm: _GRAVITY.index(alarm["state"]))
    ours = [alarm for alarm in alarms if (alarm["model"], alarm["guidance_scale"]) == headline]
    return ours, [alarm for alarm in alarms if (alarm["model"], alarm["guidance_scale"]) != headline]


def part_tables(results: Results) -> list[PartTable]:
    """The headline's differences by category and prompt length, a table per scorer."""
    model, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    parts = [p for p in results["breakdowns"] if (p["model"], p["guidance_scale"]) == (model, scale)]
    labels, tables = Labels(results), []
    for scorer in labels.ran:
        of_scorer = [part for part in parts if part["scorer"] == scorer["name"]]
        if not of_scorer:
            continue
        # What rests on too few prompts has no interval, or one that would squeeze the others
        solid = [p for p in of_scorer if p["num_prompts"] >= MIN_PROMPTS and p["low"] is not None] or of_scorer
        ends = [v for p in solid for v in (p["low"], p["difference"], p["high"]) if v is not None]
        low, high = min(0.0, *ends), max(0.0, *ends)
        domain = (low - 0.05 * (high - low), high + 0.05 * (high - low))
        groups: dict[str, list[PartRow]] = {"category": [], "prompt length": []}
        for part in of_scorer:
            mean = part["difference"]
            low, high = (mean if end is None else end for end in (part["low"], part["high"]))
            bar = plots.interval_bar(low, mean, high, domain)
            groups[part["by"]].append(PartRow(part, part["num_prompts"] < MIN_PROMPTS, bar))
        digits = labels.decimals[scorer["name"]]
        ends_shown = (signed(domain[0], digits), signed(domain[1], digits))
        tables.append(PartTable(scorer, digits, ends_shown, {by: rows for by, rows in groups.items() if rows}))
    return tables


def comparisons(results: Results) -> dict[tuple[str, str, Scale], ComparisonEntry]:
    """The comparisons with the baseline by (model, scorer, guidance scale)."""
    return _by_key(results["comparisons"])


def _means(results: Results, aggregate: Aggregate) -> dict[tuple[str, str, Scale], AggregateEntry]:
    return _by_key(row for row in results["results"] if row["aggregate"] == aggregate)


def _by_key(rows: Iterable[_Entry]) -> dict[tuple[str, str, Scale], _Entry]:
    return {(row["model"], row["scorer"], row["guidance_scale"]): row for row in rows}
