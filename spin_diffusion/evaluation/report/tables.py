"""What the tables of the page say: plain rows of text, made of results.json. The template only sets them.

To add a section: a function here that returns its rows, a field of `Page` in the package's `__init__`, its markup in
page.html.j2.
"""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from spin_diffusion.evaluation.breakdowns import MIN_PROMPTS
from spin_diffusion.evaluation.modalities import guidance_scales
from spin_diffusion.evaluation.records import Results, Scale
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.editions import scale_label
from spin_diffusion.evaluation.report.wording import (
    NAME_CHARACTERS,
    STATES,
    Number,
    State,
    Text,
    decimals_by_scorer,
    direction,
    distinct,
    interval_text,
    labels,
    p_value,
    plain,
    shortened,
    signed,
    significant,
)

MAX_FAILURES = 100
MAX_PARTS = 40
MAX_LISTED = 400
_HALF_WIDTH_CHARACTERS = 52  # of numbers, in a table of half the page's width


@dataclass(frozen=True)
class HeadlineRow:
    """What one scorer says of the headline's model."""

    title: str
    name: str
    role: str
    direction: str
    baseline: Number | None
    candidate: Number | None
    difference: Number | None
    bar: Markup | None
    counts: str
    win_rate: str
    p: str
    verdict: State | None
    is_significant: bool
    truncated: str
    out_of: str
    not_run: Text | None
    """Why there are no numbers."""


@dataclass(frozen=True)
class ModelCell:
    """One model at one guidance scale by one scorer."""

    mean: Number | None
    difference: Number | None
    mark: State | None
    """Set where the difference is significant."""


@dataclass(frozen=True)
class ModelRow:
    """A row of numbers of one model."""

    label: str
    role: str
    cells: list[ModelCell]


@dataclass(frozen=True)
class ModelTable:
    """All models by one scorer, or one aggregate of them."""

    title: str
    name: str
    role: str
    direction: str
    scales: list[str]
    rows: list[ModelRow]
    wide: bool
    """Too wide to stand beside another table."""


@dataclass(frozen=True)
class VerdictRow:
    """What is concluded of one model at one guidance scale."""

    label: str
    scale: str
    state: State
    reason: Text


@dataclass(frozen=True)
class PlaceRow:
    """What one model has won and lost against all others."""

    place: int
    label: str
    state: State | None
    """What is concluded of it against the baseline; None = it is the baseline."""
    better_than: str
    level_with: str
    worse_than: str


@dataclass(frozen=True)
class PairRow:
    """Two models by one scorer."""

    label: str
    other: str
    scorer: str
    difference: Number
    counts: str
    p: str
    mark: State | None


@dataclass(frozen=True)
class Ranking:
    """Who wins at one guidance scale."""

    scale: str
    sentence: Text
    rows: list[PlaceRow]
    pairs: list[PairRow]
    """Of the scorers that decide, without the pairs with the baseline."""


@dataclass(frozen=True)
class CurvePanel:
    """Round curves of one scorer."""

    title: str
    role: str
    direction: str
    chart: Markup


@dataclass(frozen=True)
class AlarmRow:
    """One alarm."""

    state: State
    id: str
    label: str
    scale: str
    value: str
    threshold: str
    explanation: Text


@dataclass(frozen=True)
class PartRow:
    """The difference within a part of the prompts."""

    value: Text
    num_prompts: int
    too_few: bool
    difference: Number
    bar: Markup | None


@dataclass(frozen=True)
class PartGroup:
    """All parts of one kind, such as categories."""

    by: str
    rows: list[PartRow]
    left_out: int


@dataclass(frozen=True)
class PartTable:
    """The breakdown by one scorer."""

    title: str
    role: str
    direction: str
    domain: tuple[str, str]
    groups: list[PartGroup]


@dataclass(frozen=True)
class FailureRow:
    """A sample that is broken or was not scored."""

    label: str
    scale: str
    id: str
    prompt: Text
    what: Text


def headline_rows(results: Results) -> list[HeadlineRow]:
    """The headline's table: every scorer that was asked for, run or not."""
    candidate, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    decimals = decimals_by_scorer(results)
    means, compared = _means(results, "mean"), comparisons(results)
    num_prompts = results["protocol"]["prompt_set"]["num_prompts"]
    rows = []
    for scorer in results["scorers"]:
        name, digits = scorer["name"], decimals[scorer["name"]]
        comparison = compared.get((candidate, name, scale)) if candidate is not None else None
        ran = scorer["state"] == "run"
        rows.append(
            HeadlineRow(
                title=shortened(scorer["title"] or name, 60).short,
                name=shortened(name, NAME_CHARACTERS).short,
                role=scorer["role"],
                direction=direction(scorer["role"]),
                baseline=_mean(means.get((results["baseline"], name, scale)), digits),
                candidate=_mean(means.get((candidate, name, scale)), digits) if candidate is not None else None,
                difference=_difference(comparison, digits),
                bar=_own_bar(comparison) if comparison else None,
                counts=f"{comparison['wins']} / {comparison['ties']} / {comparison['losses']}" if comparison else "",
                win_rate=_win_rate(comparison) if comparison else "",
                p=p_value(comparison["p_holm"]) if comparison else "",
                verdict=(_mark(comparison) or STATES["inconclusive"]) if comparison else None,
                is_significant=_mark(comparison) is not None,
                truncated=str(scorer["truncated_prompts"]) if ran else "",
                out_of=f"of {num_prompts}",
                not_run=None if ran else shortened(scorer["reason"] or "no reason given", 300),
            )
        )
    return rows


def model_tables(results: Results) -> list[ModelTable]:
    """Every model at every guidance scale, a table per scorer; none where the headline's table says it all."""
    if len(results["models"]) <= 2 and len(_scales(results)) == 1:
        return []
    return [table for scorer in scorers_run(results) if (table := _model_table(results, scorer, "mean"))]


def aggregate_tables(results: Results, aggregate: str) -> list[ModelTable]:
    """The same for another aggregate than the mean; a table per scorer that has it."""
    return [table for scorer in scorers_run(results) if (table := _model_table(results, scorer, aggregate))]


def _model_table(results: Results, scorer: dict[str, Any], aggregate: str) -> ModelTable | None:
    name = scorer["name"]
    means, compared = _means(results, aggregate), comparisons(results)
    scales = [s for s in _scales(results) if any((m["name"], name, s) in means for m in results["models"])]
    digits = decimals_by_scorer(results)[name]
    named = labels(model["name"] for model in results["models"])
    rows = []
    for model in results["models"][:MAX_LISTED]:
        cells = []
        for scale in scales:
            comparison = compared.get((model["name"], name, scale)) if aggregate == "mean" else None
            cells.append(
                ModelCell(
                    _mean(means.get((model["name"], name, scale)), digits),
                    _difference(comparison, digits),
                    _mark(comparison),
                )
            )
        if any(cell.mean for cell in cells):
            rows.append(ModelRow(named[model["name"]], model["role"], cells))
    if not rows:
        return None
    numbers = [n for row in rows for cell in row.cells for n in (cell.mean, cell.difference) if n]
    widest = max(len(n.value) + 1 + len(n.interval) for n in numbers)
    return ModelTable(
        shortened(scorer["title"] or name, 60).short, shortened(name, NAME_CHARACTERS).short, scorer["role"],
        direction(scorer["role"]), [scale_label(results, scale) for scale in scales], rows,
        wide=widest * len(scales) > _HALF_WIDTH_CHARACTERS,
    )  # fmt: skip


def _mark(comparison: dict[str, Any] | None) -> State | None:
    """The mark of a significant difference. A drift is marked where its interval excludes 0, and never as good."""
    if comparison is None or comparison["verdict"] == "inconclusive":
        return None
    if comparison["verdict"] == "drift" and comparison["low"] <= 0 <= comparison["high"]:
        return None
    return STATES[comparison["verdict"]]


def verdict_rows(results: Results) -> list[VerdictRow]:
    """The verdict of every model and guidance scale."""
    named = labels(model["name"] for model in results["models"])
    return [
        VerdictRow(
            named.get(v["model"], shortened(v["model"], NAME_CHARACTERS).short),
            scale_label(results, v["guidance_scale"]), STATES[v["verdict"]], shortened(v["reason"], 300),
        )
        for v in results["verdicts"][:MAX_LISTED]
    ]  # fmt: skip


def rankings(results: Results) -> list[Ranking]:
    """Who wins at each guidance scale, that of the headline first; none for two models."""
    named = labels(model["name"] for model in results["models"])
    titles = {scorer["name"]: shortened(scorer["title"] or scorer["name"], 60).short for scorer in results["scorers"]}
    verdicts = {(v["model"], v["guidance_scale"]): STATES[v["verdict"]] for v in results["verdicts"]}
    digits, found = decimals_by_scorer(results), []
    for ranking in results.get("ranking", []):
        scale, rows = ranking["guidance_scale"], []
        for place in ranking["places"][:MAX_LISTED]:
            decided = {place["model"], *place["better_than"], *place["worse_than"]}
            level = [name for name in named if name not in decided]
            rows.append(
                PlaceRow(
                    place["place"], named[place["model"]], verdicts.get((place["model"], scale)),
                    *(", ".join(named[name] for name in of)
                      for of in (place["better_than"], level, place["worse_than"])),
                )
            )  # fmt: skip
        pairs = [
            PairRow(
                named[pair["model"]], named[pair["baseline"]], titles[pair["scorer"]],
                _difference(pair, digits[pair["scorer"]]), f"{pair['wins']} / {pair['ties']} / {pair['losses']}",
                p_value(pair["p_holm"]), _mark(pair),
            )
            for pair in results.get("between_others", [])
            if pair["guidance_scale"] == scale and pair["scorer"] in ranking["scorers"]
        ]  # fmt: skip
        found.append(
            Ranking(scale_label(results, scale), shortened(ranking["sentence"], 600), rows, pairs[:MAX_LISTED])
        )
    headline = scale_label(results, results["headline"]["guidance_scale"])
    return sorted(found, key=lambda ranking: ranking.scale != headline)


def curve_panels(results: Results) -> list[CurvePanel]:
    """Paired differences over the rounds, a panel per scorer; none for fewer than two rounds."""
    rounds = {m["name"]: m["round"] for m in results["models"] if m["role"] == "round" and m["round"] is not None}
    base_round = next((m["round"] for m in results["models"] if m["name"] == results["baseline"]), None)
    if len(set(rounds.values()) | ({base_round} - {None})) < 2 or len(set(rounds.values())) < len(rounds):
        return []  # a round that is there twice belongs to two runs: one line would join what does not belong together
    compared = comparisons(results)
    panels = []
    for number, scorer in enumerate(scorers_run(results)):
        lines = []
        for style, scale in enumerate(_scales(results)):
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
            title = shortened(scorer["title"] or scorer["name"], 60).short
            chart = plots.round_curves(f"curve-{number}", "Difference to the baseline over the rounds", lines)
            panels.append(CurvePanel(title, scorer["role"], direction(scorer["role"]), chart))
    return panels


def legend(results: Results) -> list[tuple[Markup, str]]:
    """What the lines of the round curves stand for."""
    return [(plots.legend_key(style), scale_label(results, scale)) for style, scale in enumerate(_scales(results))]


def alarm_rows(results: Results) -> tuple[list[AlarmRow], list[AlarmRow]]:
    """The alarms of the headline's model and guidance scale, and all others; the gravest first."""
    named = labels(model["name"] for model in results["models"])
    gravity = {"alarm": 0, "warn": 1, "ok": 2, "not run": 3}
    headline = (results["headline"]["model"], results["headline"]["guidance_scale"])
    ours, others = [], []
    for alarm in sorted(results["alarms"], key=lambda alarm: gravity[alarm["state"]]):
        row = AlarmRow(
            STATES[alarm["state"]], shortened(alarm["id"], 60).short,
            named.get(alarm["model"], shortened(alarm["model"], NAME_CHARACTERS).short),
            scale_label(results, alarm["guidance_scale"]), significant(alarm["value"]), significant(alarm["threshold"]),
            shortened(alarm["explanation"], 400),
        )  # fmt: skip
        (ours if (alarm["model"], alarm["guidance_scale"]) == headline else others).append(row)
    return ours, others


def part_tables(results: Results) -> list[PartTable]:
    """The headline's differences by category and prompt length, a table per scorer."""
    model, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    parts = [p for p in results["breakdowns"] if (p["model"], p["guidance_scale"]) == (model, scale)]
    decimals = decimals_by_scorer(results)
    tables = []
    for scorer in scorers_run(results):
        of_scorer = [part for part in parts if part["scorer"] == scorer["name"]]
        if not of_scorer:
            continue
        digits = decimals[scorer["name"]]
        # What rests on too few prompts has no interval, or one that would squeeze the others
        solid = [p for p in of_scorer if p["num_prompts"] >= MIN_PROMPTS and p["low"] is not None] or of_scorer
        ends = [v for p in solid for v in (p["low"], p["difference"], p["high"]) if v is not None]
        domain = _padded(min(0.0, *ends), max(0.0, *ends))
        groups = []
        for by in ("category", "prompt length"):
            rows = [_part_row(part, digits, domain) for part in of_scorer if part["by"] == by]
            if rows:
                groups.append(PartGroup(by, rows[:MAX_PARTS], max(0, len(rows) - MAX_PARTS)))
        tables.append(
            PartTable(
                shortened(scorer["title"] or scorer["name"], 60).short, scorer["role"], direction(scorer["role"]),
                (signed(domain[0], digits), signed(domain[1], digits)), groups,
            )
        )  # fmt: skip
    return tables


def _part_row(part: dict[str, Any], digits: int, domain: tuple[float, float]) -> PartRow:
    low, high = part["low"], part["high"]
    interval = "" if low is None or high is None else interval_text(low, high, digits, with_sign=True)
    bar = plots.interval_bar(
        part["difference"] if low is None else low, part["difference"], part["difference"] if high is None else high,
        domain,
    )  # fmt: skip
    return PartRow(
        shortened(part["value"] or "(none)", 80), part["num_prompts"], part["num_prompts"] < MIN_PROMPTS,
        Number(signed(part["difference"], digits), interval), bar,
    )  # fmt: skip


def failure_rows(results: Results) -> tuple[list[FailureRow], int]:
    """The first failures, and how many there are."""
    named = labels(model["name"] for model in results["models"])
    rows = [
        FailureRow(
            named.get(f["model"], shortened(f["model"], NAME_CHARACTERS).short),
            scale_label(results, f["guidance_scale"]), shortened(f["id"], NAME_CHARACTERS).short,
            _brief(f["prompt"] or "(empty prompt)"), _brief(f["what"]),
        )
        for f in results["failures"][:MAX_FAILURES]
    ]  # fmt: skip
    return rows, len(results["failures"])


def _brief(text: str) -> Text:
    return Text(shortened(text).short, None, "")


def scorers_run(results: Results) -> list[dict[str, Any]]:
    """What is known of each scorer that gave scores."""
    return [scorer for scorer in results["scorers"] if scorer["state"] == "run"]


def _scales(results: Results) -> list[Scale]:
    return distinct([*guidance_scales(results["protocol"]), *(row["guidance_scale"] for row in results["results"])])


def _means(results: Results, aggregate: str) -> dict[tuple[str, str, Scale], dict[str, Any]]:
    return {
        (row["model"], row["scorer"], row["guidance_scale"]): row
        for row in results["results"]
        if row["aggregate"] == aggregate
    }


def comparisons(results: Results) -> dict[tuple[str, str, Scale], dict[str, Any]]:
    """By (model, scorer, guidance scale)."""
    return {(row["model"], row["scorer"], row["guidance_scale"]): row for row in results["comparisons"]}


def _mean(row: dict[str, Any] | None, digits: int) -> Number | None:
    return Number(plain(row["mean"], digits), interval_text(row["low"], row["high"], digits, False)) if row else None


def _difference(row: dict[str, Any] | None, digits: int) -> Number | None:
    return (
        Number(signed(row["difference"], digits), interval_text(row["low"], row["high"], digits, True)) if row else None
    )


def _win_rate(row: dict[str, Any]) -> str:
    """In percent, with its interval if results.json has one: older ones have none."""
    rate = f"{100 * row['win_rate']:.1f} %"
    if "win_rate_low" not in row:
        return rate
    return f"{rate} {interval_text(100 * row['win_rate_low'], 100 * row['win_rate_high'], 0, False)}"


def _own_bar(row: dict[str, Any]) -> Markup:
    """An interval on its own scale, 0 in the middle."""
    reach = 1.1 * max(abs(row["low"]), abs(row["high"]), abs(row["difference"]))
    return plots.interval_bar(row["low"], row["difference"], row["high"], (-reach, reach))


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.05 * (high - low)
    return low - pad, high + pad
