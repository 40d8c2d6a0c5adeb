"""What the tables of the page say beyond the entries of results.json, which the template sets itself.

To add a section: its content in `_sections` of the package's `__init__`, its markup in page.html.j2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from markupsafe import Markup

from spin_diffusion.evaluation.comparison import MIN_PROMPTS
from spin_diffusion.evaluation.records import (
    Aggregate,
    AggregateEntry,
    AlarmEntry,
    ComparisonEntry,
    Metric,
    ModelEntry,
    PartEntry,
    Results,
    Scale,
    ScorerEntry,
    modality_of,
    samples_per_prompt,
)
from spin_diffusion.evaluation.report import plots, wording
from spin_diffusion.evaluation.report.editions import edition_of
from spin_diffusion.evaluation.report.plots import Panel
from spin_diffusion.evaluation.report.reading import Evaluation, Labels, differences
from spin_diffusion.evaluation.tables import distance_decimals, distance_direction, distribution_title, not_told

MAX_PARTS = 40
_HALF_WIDTH_CHARACTERS = 52  # of numbers, in a table of half the page's width
_GRAVITY = ("alarm", "warn", "ok", "not run")
_Entry = TypeVar("_Entry", AggregateEntry, ComparisonEntry)


@dataclass(frozen=True)
class HeadlineRow:
    """What one scorer says of the headline's model; of a scorer that was not run there is nothing but its entry."""

    scorer: ScorerEntry
    baseline: wording.Number | None
    candidate: wording.Number | None
    comparison: ComparisonEntry | None
    difference: wording.Number | None
    mark: wording.State | None
    """Set where the difference is significant."""

    @property
    def verdict(self) -> wording.State | None:
        """The verdict as the page shows it: a drift that is not significant is inconclusive."""
        return (self.mark or wording.STATES["inconclusive"]) if self.comparison else None


@dataclass(frozen=True)
class ModelCell:
    """One model at one guidance scale by one scorer."""

    mean: wording.Number | None
    difference: wording.Number | None
    mark: wording.State | None
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
class DistanceCell:
    """A metric of the distribution of one model's pictures; of the baseline there is no difference."""

    metric: Metric
    better: str
    value: wording.Number
    difference: wording.Number | None
    mark: wording.State | None
    """Set where the interval of the difference excludes 0."""
    bar: Markup


@dataclass(frozen=True)
class DistanceTables:
    """What is compared; each metric of the baseline and of the headline's model (None without one); all metrics, and
    the cells of every model at every guidance scale, where there are more than these two."""

    title: str
    headline: list[tuple[DistanceCell, DistanceCell | None]]
    metrics: list[Metric]
    models: list[tuple[tuple[str, Scale], list[DistanceCell]]]


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


def mark(comparison: ComparisonEntry | None) -> wording.State | None:
    """The mark of a significant difference. A drift is marked where its interval excludes 0, and never as good."""
    if comparison is None or comparison["verdict"] == "inconclusive":
        return None
    if comparison["verdict"] == "drift" and comparison["low"] <= 0 <= comparison["high"]:
        return None
    return wording.STATES[comparison["verdict"]]


def own_bar(row: ComparisonEntry) -> Markup:
    """A difference's interval as a picture on its own scale, 0 in the middle."""
    reach = 1.1 * max(abs(row["low"]), abs(row["high"]), abs(row["difference"]))
    return plots.interval_bar(row["low"], row["difference"], row["high"], (-reach, reach))


def win_rate(row: ComparisonEntry) -> str:
    """In percent, with its interval if results.json has one: older ones have none."""
    rate = f"{100 * row['win_rate']:.1f} %"
    if "win_rate_low" not in row:
        return rate
    return f"{rate} [{wording.plain(100 * row['win_rate_low'], 0)}, {wording.plain(100 * row['win_rate_high'], 0)}]"


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


def distance_tables(results: Results) -> DistanceTables | None:
    """How far the distribution of the models' pictures is from that of real ones; None where it was not asked."""
    compared, headline = results.get("distribution"), results["headline"]
    if compared is None:
        return None
    digits = distance_decimals(compared["distances"])
    by_model: dict[tuple[str, Scale], list[DistanceCell]] = {}
    for entry in compared["distances"]:
        decimals = digits[entry["metric"]]
        value = wording.number(entry["value"], entry["low"], entry["high"], decimals)
        difference, bar = None, Markup()
        if "difference" in entry:
            low, mean, high = entry["difference_low"], entry["difference"], entry["difference_high"]
            difference = wording.number(mean, low, high, decimals, wording.signed)
            reach = 1.1 * max(abs(low), abs(high))
            bar = plots.interval_bar(low, mean, high, (-reach, reach))
        mark = {1: wording.BETTER, -1: wording.WORSE}.get(distance_direction(entry))
        cell = DistanceCell(entry["metric"], entry["better"], value, difference, mark, bar)
        by_model.setdefault((entry["model"], entry["guidance_scale"]), []).append(cell)
    scale = headline["guidance_scale"]
    candidate = by_model.get((headline["model"] or "", scale), [])
    return DistanceTables(
        distribution_title(compared) + (f". {not_told(compared)}" if compared["left_out"] else "."),
        list(zip_longest(by_model.get((results["baseline"], scale), []), candidate)),
        list(digits),
        list(by_model.items()) if len(by_model) > 2 else [],
    )


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
        for model in results["models"][: wording.MAX_LISTED]:
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


def curve_panels(results: Results) -> list[plots.Panel]:
    """Paired differences over the rounds, a panel per scorer; none for fewer than two rounds."""
    rounds = {m["name"]: m["round"] for m in results["models"] if m["role"] == "round" and m["round"] is not None}
    base_round = next((m["round"] for m in results["models"] if m["name"] == results["baseline"]), None)
    if len(set(rounds.values()) | ({base_round} - {None})) < 2 or len(set(rounds.values())) < len(rounds):
        return []  # a round that is there twice belongs to two runs: one line would join what does not belong together
    start = [] if base_round is None else [base_round]
    return _difference_panels(results, "curve", "Difference to the baseline over the rounds", rounds, start, "round")


def strength_panels(results: Results) -> list[plots.Panel]:
    """Paired differences over the strength of one player, a panel per scorer; none for fewer than two strengths, or for
    several players. The baseline has the strength 0 where it is the player's base."""
    found = [(m, strength) for m in results["models"] if (strength := m.get("strength")) is not None]
    players = {m["source"].removesuffix(f"@{strength:g}") for m, strength in found}
    if len(players) != 1 or len({strength for _, strength in found}) < max(2, len(found)):
        return []
    baseline = next(m for m in results["models"] if m["name"] == results["baseline"])
    is_base = baseline["kind"] == "pipeline" and baseline["base"] == found[0][0]["base"]
    strengths = {m["name"]: strength for m, strength in found}
    start = [0.0] if is_base else [strengths[baseline["name"]]] if baseline["name"] in strengths else []
    label = "Difference to the baseline over the strength"
    return _difference_panels(results, "strength", label, strengths, start, "strength")


def _difference_panels(
    results: Results, key: str, label: str, at: Mapping[str, float], start: Sequence[float], xlabel: str
) -> list[plots.Panel]:
    """Paired differences over a number, a panel per scorer.

    Args:
        at: the number of each model.
        start: the baseline's, if it has one.
    """
    labels, compared, panels = Labels(results), comparisons(results), []
    for number, scorer in enumerate(labels.ran):
        lines = []
        for style, scale in enumerate(labels.scales):
            points = [(place, 0.0, 0.0, 0.0) for place in start]
            points += [
                (place, c["difference"], c["low"], c["high"])
                for model, place in at.items()
                if (c := compared.get((model, scorer["name"], scale)))
            ]
            if len(points) > 1:
                columns = [list(column) for column in zip(*sorted(points), strict=True)]
                lines.append(plots.Line(style, *columns))
        if lines:
            chart = plots.round_curves(f"{key}-{number}", label, lines, xlabel=xlabel)
            role = scorer["role"]
            panels.append(plots.Panel(labels.title(scorer["name"]), chart, role, wording.direction(role)))
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
        ends_shown = (wording.signed(domain[0], digits), wording.signed(domain[1], digits))
        tables.append(PartTable(scorer, digits, ends_shown, {by: rows for by, rows in groups.items() if rows}))
    return tables


def comparisons(results: Results) -> dict[tuple[str, str, Scale], ComparisonEntry]:
    """The comparisons with the baseline by (model, scorer, guidance scale)."""
    return _by_key(results["comparisons"])


def _means(results: Results, aggregate: Aggregate) -> dict[tuple[str, str, Scale], AggregateEntry]:
    return _by_key(row for row in results["results"] if row["aggregate"] == aggregate)


def _by_key(rows: Iterable[_Entry]) -> dict[tuple[str, str, Scale], _Entry]:
    return {(row["model"], row["scorer"], row["guidance_scale"]): row for row in rows}


def distributions(evaluation: Evaluation) -> list[Panel]:
    """Histograms of the headline's paired differences."""
    results = evaluation.results
    model = results["headline"]["model"]
    if model is None or model == results["baseline"]:
        return []
    labels = Labels(results)
    complete = _complete_prompts(evaluation, labels.ran)
    panels = []
    for number, scorer in enumerate(labels.ran):
        by_prompt: dict[str, list[float]] = {}
        for (id_, _), value in differences(evaluation.scores, scorer["name"], results["baseline"], model).items():
            if id_ in complete:
                by_prompt.setdefault(id_, []).append(value)
        values = [float(np.mean(of_prompt)) for of_prompt in by_prompt.values()]
        title, digits = labels.title(scorer["name"]), labels.decimals[scorer["name"]]
        if not values:
            continue
        low, middle, high = (wording.signed(float(q), digits) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        mean = wording.signed(float(np.mean(values)), digits)
        caption = f"{len(values)} prompts: mean {mean}, quartiles {low}, {middle}, {high}"
        role = scorer["role"]
        chart = plots.histogram(f"histogram-{number}", f"Histogram of differences, {caption}", values, role == "drift")
        panels.append(Panel(title, chart, role, wording.direction(role), caption))
    return panels


def _complete_prompts(evaluation: Evaluation, ran: Sequence[ScorerEntry]) -> set[str]:
    """Prompts of which every model has every sample scored by every scorer: the same ones as in the tables."""
    keys: dict[str, set[tuple[str, str, int]]] = {}
    for model, scorer, id_, k in evaluation.scores:
        keys.setdefault(id_, set()).add((model, scorer, k))
    wanted = {
        (model["name"], scorer["name"], k)
        for model in evaluation.results["models"]
        for scorer in ran
        for k in range(samples_per_prompt(evaluation.results["protocol"]))
    }
    return {id_ for id_, has in keys.items() if has >= wanted}


# Small print


Facts = list[tuple[str, wording.Text]]
"""Names and what is known under them."""


def banner_facts(results: Results) -> list[tuple[str, str]]:
    """The banner's small print."""
    protocol = results["protocol"]
    ran = sum(scorer["state"] == "run" for scorer in results["scorers"])
    headline = (results["headline"]["model"], results["headline"]["guidance_scale"])
    states = [a["state"] for a in results["alarms"] if (a["model"], a["guidance_scale"]) == headline]
    alarms = f"{_counted(states.count('alarm'), 'alarm')}, {_counted(states.count('warn'), 'warning')}"
    asked, scale = protocol["prompt_set"]["num_prompts"], results["headline"]["guidance_scale"]
    compared = next((row["num_prompts"] for row in results["results"] if row["guidance_scale"] == scale), asked)
    return [
        ("prompts compared", f"{compared:,}" if compared == asked else f"{compared:,} of {asked:,}"),
        (f"{modality_of(protocol).plural} per prompt", str(samples_per_prompt(protocol))),
        ("scorers run", f"{ran} of {len(results['scorers'])}"),
        ("alarms", alarms if states else "none computed"),
        ("protocol", protocol["id"][:12]),
    ]


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


def protocol_facts(results: Results) -> Facts:
    """How the samples were made, as far as it decides whether two evaluations may be compared."""
    protocol = results["protocol"]
    prompts = protocol["prompt_set"]
    facts = [
        ("protocol id", protocol["id"]),
        ("prompts", f"{prompts['name']}, {prompts['num_prompts']:,}"),
        ("prompts: SHA-256", prompts["sha256"]),
        ("prompts: licence", prompts["licence"]),
        ("prompts: source", prompts["source"]),
        (f"{modality_of(protocol).plural} per prompt", str(samples_per_prompt(protocol))),
        ("seed", str(protocol["seed"])),
        ("rule for seeds", protocol["seed_rule"]),
        *edition_of(results).how(protocol),
    ]
    return [(wording.shortened(name, 60).short, wording.shortened(value)) for name, value in facts]


def scorer_facts(scorer: ScorerEntry) -> Facts:
    """What is known of one scorer; nothing that is empty."""
    facts = [
        ("name", scorer["name"]),
        ("state", scorer["state"] + (f": {scorer['reason']}" if scorer["reason"] else "")),
        ("role", scorer["role"]),
        ("scale", scorer["scale"]),
        ("weights from", scorer["source"]),
        *((f"SHA-256 of {file}", value) for file, value in scorer["checkpoint"].items()),
        ("pixels", scorer["preprocessing"]),
        ("text", scorer["text"]),
        ("licence", scorer["licence"]),
        ("citation", scorer["citation"]),
    ]
    return [(wording.shortened(name, 60).short, wording.shortened(value, 300)) for name, value in facts if value]
