"""What the tables of the page say: plain rows of text, made of results.json. The template only sets them.

To add a section: a function here that returns its rows, a field of `Page` in the package's `__init__`, its markup in
page.html.j2.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from spin_diffusion.evaluation.protocols import guidance_scales, is_of_answers, samples_per_prompt
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.pictures import differences
from spin_diffusion.evaluation.report.reading import Evaluation

MIN_PROMPTS = 20
"""A part of the prompts with fewer than these says too little."""
MAX_FAILURES = 100
MAX_PARTS = 40
MAX_LISTED = 400
_NAME_CHARACTERS = 48
_PROMPT_CHARACTERS = 180
_PASSAGE_CHARACTERS, _PASSAGE_LINES = 900, 24
_FULL_CHARACTERS = 20_000
_HALF_WIDTH_CHARACTERS = 52  # of numbers, in a table of half the page's width

_T = TypeVar("_T")
Results = dict[str, Any]
Scale = float | None


@dataclass(frozen=True)
class Text:
    """Text of any length: what is shown at once, and the rest behind it."""

    short: str
    full: str | None
    """None = `short` is all there is."""
    note: str
    """How much there is, where `full` is not None."""


@dataclass(frozen=True)
class State:
    """A verdict or a state in a symbol, a word and a colour: never in the colour alone."""

    word: str
    symbol: str
    tone: str
    """CSS class: good, bad, quiet, warn, drift."""


@dataclass(frozen=True)
class Number:
    """A number and its interval, formatted."""

    value: str
    interval: str


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
class Distribution:
    """Paired differences by one scorer."""

    title: str
    role: str
    direction: str
    caption: str
    chart: Markup


@dataclass(frozen=True)
class FailureRow:
    """A sample that is broken or was not scored."""

    label: str
    scale: str
    id: str
    prompt: Text
    what: Text


STATES = {
    "improved": State("improved", "\u25b2", "good"),
    "regressed": State("regressed", "\u25bc", "bad"),
    "inconclusive": State("inconclusive", "\u25cb", "quiet"),
    "drift": State("drift", "\u25c6", "drift"),
    "suspect": State("suspect", "!", "warn"),
    "ok": State("ok", "\u2713", "quiet"),
    "warn": State("warning", "!", "warn"),
    "alarm": State("alarm", "!!", "bad"),
    "not run": State("not run", "\u2013", "quiet"),
}

ROLES = {
    "truth": "Knows the right answer, as the oracle of a drawn world does.",
    "in-domain": "A preference model trained on the kind of data that the player learns from. It is easy to please: a "
    "gain here alone is not evidence of better images.",
    "held-out": "A preference model trained on other data. The gain that counts.",
    "alignment": "Agreement of the image with its prompt. It guards against images that please but do not obey.",
    "aesthetics": "Beauty whatever the prompt. It can rise while the image drifts from what was asked.",
    "drift": "A measure that is good neither up nor down. It shows that something changed, and is never called a gain.",
}

ROLES_OF_ANSWERS = ROLES | {
    "truth": "Knows the right answer.",
    "in-domain": "A preference model trained on the kind of data that the player learns from. It is easy to please: a "
    "gain here alone is not evidence of better answers.",
    "held-out": "A preference model trained on other data, or the likelihood of real answers that were not trained on. "
    "The gain that counts.",
    "alignment": "Agreement of the answer with its prompt. It guards against answers that please but do not obey.",
    "aesthetics": "Style whatever the prompt. It can rise while the answer drifts from what was asked.",
}


def clean(text: str) -> str:
    """Text that HTML, SVG and JSON can hold: control characters become visible, what is no character a U+FFFD."""
    return _UNPRINTABLE.sub(_visible, text)


# Controls but tab and line feed, halves of surrogate pairs, and the two code points at the end of each plane
_PLANE_ENDS = "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_PLANE_ENDS}]")


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def shortened(text: str, length: int = _PROMPT_CHARACTERS) -> Text:
    """`text` with no more than `length` characters shown at once, and no more than 20,000 in all."""
    lines = " ".join(text.split())
    if len(lines) <= length:
        return Text(lines, None, "")
    return Text(lines[: length - 1].rstrip() + "\u2026", text[:_FULL_CHARACTERS], _length(text))


def passage(text: str) -> Text:
    """An answer with its line breaks: its beginning at once, and no more than 20,000 characters in all."""
    text = text.replace("\r\n", "\n").strip()
    lines = text.split("\n")
    if len(text) <= _PASSAGE_CHARACTERS and len(lines) <= _PASSAGE_LINES:
        return Text(text, None, "")
    short = "\n".join(lines[:_PASSAGE_LINES])[: _PASSAGE_CHARACTERS - 1].rstrip() + "\u2026"
    return Text(short, text[:_FULL_CHARACTERS], _length(text))


def _length(text: str) -> str:
    if len(text) > _FULL_CHARACTERS:
        return f"the first {_FULL_CHARACTERS:,} of {len(text):,} characters"
    return f"all {len(text):,} characters"


def labels(names: Iterable[str]) -> dict[str, str]:
    """A short label for every name, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        label = " ".join(name.split()) or "(no name)"
        if len(label) > _NAME_CHARACTERS:
            label = label[: _NAME_CHARACTERS - 16] + "\u2026" + label[-15:]
        number = 1
        while (unique := label if number == 1 else f"{label} ({number})") in found.values():
            number += 1
        found[name] = unique
    return found


def scale_label(results: Results, scale: Scale) -> str:
    """How the samples were drawn, in words; of pictures, None stands for those that were given, not drawn."""
    if is_of_answers(results["protocol"]):
        temperature = results["protocol"]["sampling"]["temperature"]
        return f"temperature {temperature:g}" if temperature else "greedy"
    return "as given" if scale is None else f"guidance {scale:g}"


def direction(role: str) -> str:
    """Which way a score of this role is better."""
    return "neither way is better" if role == "drift" else "higher is better"


def signed(value: float, decimals: int) -> str:
    """A difference with its sign, never -0."""
    return _minus(f"{round(value, decimals) + 0.0:+.{decimals}f}")


def plain(value: float, decimals: int) -> str:
    """A number without a plus sign, never -0."""
    return _minus(f"{round(value, decimals) + 0.0:.{decimals}f}")


def significant(value: float | None) -> str:
    """A number of unknown size in four digits; a dash for None."""
    return "\u2013" if value is None else _minus(f"{value:.4g}")


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def decimals_by_scorer(results: Results) -> dict[str, int]:
    """Decimals that show two digits of each scorer's narrowest interval; 6 at most, 3 where no interval has a width."""
    widths: dict[str, list[float]] = {}
    for row in [*results["results"], *results["comparisons"]]:
        if row["high"] > row["low"]:
            widths.setdefault(row["scorer"], []).append((row["high"] - row["low"]) / 2)
    found = {}
    for scorer in results["scorers"]:
        of_scorer = widths.get(scorer["name"], [])
        # Far narrower than the others: a difference that is the same for all prompts, but for rounding
        narrowest = min((width for width in of_scorer if width > 1e-3 * max(of_scorer)), default=None)
        found[scorer["name"]] = 3 if narrowest is None else min(6, max(0, 1 - math.floor(math.log10(narrowest))))
    return found


def headline_rows(results: Results) -> list[HeadlineRow]:
    """The headline's table: every scorer that was asked for, run or not."""
    candidate, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    decimals = decimals_by_scorer(results)
    means, compared = _means(results, "mean"), _comparisons(results)
    num_prompts = results["protocol"]["prompt_set"]["num_prompts"]
    rows = []
    for scorer in results["scorers"]:
        name, digits = scorer["name"], decimals[scorer["name"]]
        comparison = compared.get((candidate, name, scale)) if candidate is not None else None
        ran = scorer["state"] == "run"
        rows.append(
            HeadlineRow(
                title=shortened(scorer["title"] or name, 60).short,
                name=shortened(name, _NAME_CHARACTERS).short,
                role=scorer["role"],
                direction=direction(scorer["role"]),
                baseline=_mean(means.get((results["baseline"], name, scale)), digits),
                candidate=_mean(means.get((candidate, name, scale)), digits) if candidate is not None else None,
                difference=_difference(comparison, digits),
                bar=_own_bar(comparison) if comparison else None,
                counts=f"{comparison['wins']} / {comparison['ties']} / {comparison['losses']}" if comparison else "",
                win_rate=f"{100 * comparison['win_rate']:.1f} %" if comparison else "",
                p=p_value(comparison["p_holm"]) if comparison else "",
                verdict=STATES[comparison["verdict"]] if comparison else None,
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
    return [table for scorer in _ran(results) if (table := _model_table(results, scorer, "mean"))]


def aggregate_tables(results: Results, aggregate: str) -> list[ModelTable]:
    """The same for another aggregate than the mean; a table per scorer that has it."""
    return [table for scorer in _ran(results) if (table := _model_table(results, scorer, aggregate))]


def _model_table(results: Results, scorer: dict[str, Any], aggregate: str) -> ModelTable | None:
    name = scorer["name"]
    means, compared = _means(results, aggregate), _comparisons(results)
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
        shortened(scorer["title"] or name, 60).short, shortened(name, _NAME_CHARACTERS).short, scorer["role"],
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
            named.get(v["model"], shortened(v["model"], _NAME_CHARACTERS).short),
            scale_label(results, v["guidance_scale"]), STATES[v["verdict"]], shortened(v["reason"], 300),
        )
        for v in results["verdicts"][:MAX_LISTED]
    ]  # fmt: skip


def curve_panels(results: Results) -> list[CurvePanel]:
    """Paired differences over the rounds, a panel per scorer; none for fewer than two rounds."""
    rounds = {m["name"]: m["round"] for m in results["models"] if m["role"] == "round" and m["round"] is not None}
    base_round = next((m["round"] for m in results["models"] if m["name"] == results["baseline"]), None)
    if len(set(rounds.values()) | ({base_round} - {None})) < 2 or len(set(rounds.values())) < len(rounds):
        return []  # a round that is there twice belongs to two runs: one line would join what does not belong together
    compared = _comparisons(results)
    panels = []
    for number, scorer in enumerate(_ran(results)):
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
            named.get(alarm["model"], shortened(alarm["model"], _NAME_CHARACTERS).short),
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
    for scorer in _ran(results):
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


def distributions(evaluation: Evaluation) -> tuple[list[Distribution], list[str]]:
    """Histograms of the headline's paired differences, and what scores.parquet says that results.json does not."""
    results = evaluation.results
    model, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    if model is None or model == results["baseline"]:
        return [], []
    compared, digits = _comparisons(results), decimals_by_scorer(results)
    complete = _complete_prompts(evaluation)
    found, doubts = [], []
    for number, scorer in enumerate(_ran(results)):
        comparison = compared.get((model, scorer["name"], scale))
        by_prompt: dict[str, list[float]] = {}
        for (id_, _), value in differences(evaluation.scores, scorer["name"], results["baseline"], model).items():
            if id_ in complete:
                by_prompt.setdefault(id_, []).append(value)
        values = [float(np.mean(of_prompt)) for of_prompt in by_prompt.values()]
        title = shortened(scorer["title"] or scorer["name"], 60).short
        if comparison is not None and not _agree(values, comparison):
            said = f"{signed(float(np.mean(values)), 6)} over {len(values)}" if values else "nothing over 0"
            doubts.append(
                f"scores.parquet gives {said} prompts as the mean difference by {title}, results.json "
                f"{signed(comparison['difference'], 6)} over {comparison['num_prompts']}: the histogram and the "
                "gallery may be of another evaluation than the tables."
            )
        if not values:
            continue
        mean = signed(float(np.mean(values)), digits[scorer["name"]])
        quartiles = [signed(float(q), digits[scorer["name"]]) for q in np.quantile(values, [0.25, 0.5, 0.75])]
        caption = f"{len(values)} prompts: mean {mean}, quartiles {quartiles[0]}, {quartiles[1]}, {quartiles[2]}"
        chart = plots.histogram(
            f"histogram-{number}", f"Histogram of differences, {caption}", values, scorer["role"] == "drift"
        )
        found.append(Distribution(title, scorer["role"], direction(scorer["role"]), caption, chart))
    return found, doubts


def _complete_prompts(evaluation: Evaluation) -> set[str]:
    """Prompts of which every model has every sample scored by every scorer: the same ones as in the tables."""
    keys: dict[str, set[tuple[str, str, int]]] = {}
    for model, scorer, id_, k in evaluation.scores:
        keys.setdefault(id_, set()).add((model, scorer, k))
    wanted = {
        (model["name"], scorer["name"], k)
        for model in evaluation.results["models"]
        for scorer in _ran(evaluation.results)
        for k in range(samples_per_prompt(evaluation.results["protocol"]))
    }
    return {id_ for id_, has in keys.items() if has >= wanted}


def _agree(values: list[float], comparison: dict[str, Any]) -> bool:
    if len(values) != comparison["num_prompts"]:
        return False
    width = max(comparison["high"] - comparison["low"], abs(comparison["difference"]))
    return bool(not values or abs(float(np.mean(values)) - comparison["difference"]) <= 1e-3 * width + 1e-9)


def failure_rows(results: Results) -> tuple[list[FailureRow], int]:
    """The first failures, and how many there are."""
    named = labels(model["name"] for model in results["models"])
    rows = [
        FailureRow(
            named.get(f["model"], shortened(f["model"], _NAME_CHARACTERS).short),
            scale_label(results, f["guidance_scale"]), shortened(f["id"], _NAME_CHARACTERS).short,
            _brief(f["prompt"] or "(empty prompt)"), _brief(f["what"]),
        )
        for f in results["failures"][:MAX_FAILURES]
    ]  # fmt: skip
    return rows, len(results["failures"])


def _brief(text: str) -> Text:
    return Text(shortened(text).short, None, "")


def _ran(results: Results) -> list[dict[str, Any]]:
    return [scorer for scorer in results["scorers"] if scorer["state"] == "run"]


def _scales(results: Results) -> list[Scale]:
    return distinct([*guidance_scales(results["protocol"]), *(row["guidance_scale"] for row in results["results"])])


def _means(results: Results, aggregate: str) -> dict[tuple[str, str, Scale], dict[str, Any]]:
    return {
        (row["model"], row["scorer"], row["guidance_scale"]): row
        for row in results["results"]
        if row["aggregate"] == aggregate
    }


def _comparisons(results: Results) -> dict[tuple[str, str, Scale], dict[str, Any]]:
    return {(row["model"], row["scorer"], row["guidance_scale"]): row for row in results["comparisons"]}


def _mean(row: dict[str, Any] | None, digits: int) -> Number | None:
    return Number(plain(row["mean"], digits), interval_text(row["low"], row["high"], digits, False)) if row else None


def _difference(row: dict[str, Any] | None, digits: int) -> Number | None:
    return (
        Number(signed(row["difference"], digits), interval_text(row["low"], row["high"], digits, True)) if row else None
    )


def interval_text(low: float, high: float, digits: int, with_sign: bool) -> str:
    """[low, high]"""
    of = signed if with_sign else plain
    return f"[{of(low, digits)}, {of(high, digits)}]"


def _own_bar(row: dict[str, Any]) -> Markup:
    """An interval on its own scale, 0 in the middle."""
    reach = 1.1 * max(abs(row["low"]), abs(row["high"]), abs(row["difference"]))
    return plots.interval_bar(row["low"], row["difference"], row["high"], (-reach, reach))


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.05 * (high - low)
    return low - pad, high + pad


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def distinct(values: Sequence[_T]) -> list[_T]:
    """Each once, in the order of their first appearance."""
    return list(dict.fromkeys(values))
