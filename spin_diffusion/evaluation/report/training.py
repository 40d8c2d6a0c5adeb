"""How the models were trained, and what was measured of them beside their scores: the page's section "Training"."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from spin_diffusion.evaluation.records import Results
from spin_diffusion.evaluation.report import plots, tables, wording
from spin_diffusion.evaluation.report.editions import edition_of


@dataclass(frozen=True)
class TrainingPanel:
    """How a run was trained."""

    label: str
    caption: str
    chart: Markup


@dataclass(frozen=True)
class EventRow:
    """What a rule of health said of a round."""

    label: str
    round_: int
    step: str
    rule: str
    state: wording.State
    outcome: str
    sentence: wording.Text


@dataclass(frozen=True)
class LedgerRow:
    """What a phase of a round took; a dash where it is not known."""

    label: str
    round_: int
    phase: str
    seconds: str
    predicted: str
    samples: str
    rate: str
    work: str
    share: str
    memory: str


@dataclass(frozen=True)
class MeasureRow:
    """A measure of every model."""

    title: str
    direction: str
    cells: list[wording.Number | None]


@dataclass(frozen=True)
class MeasureTable:
    """All measures of all models."""

    labels: list[str]
    rows: list[MeasureRow]


def training_panels(results: Results) -> list[TrainingPanel]:
    """What happened to the real and the generated samples in training, a panel per run.

    The rounds of the evaluation are one run, unless two of them have one number; every other name is one of its own.
    """
    by_run = _by_run(results, results.get("training_curves", []))
    named = wording.labels(wording.distinct([*(m["name"] for m in results["models"]), *by_run]))
    panels, unit_of_r = [], edition_of(results).unit_of_r
    for number, (run, rows) in enumerate(by_run.items()):
        points, starts = _one_after_the_other(rows)
        if not any(value is not None for _, real, generated in points for value in (real, generated)):
            continue
        label = named[run] if run else "rounds of this run"
        last = points[-1]
        caption = f"{len(starts)} round{'' if len(starts) == 1 else 's'}, {last[0]:,} steps; at the end r of real "
        caption += f"{wording.significant(last[1])}, of generated {wording.significant(last[2])}"
        chart = plots.training_curves(f"training-{number}", f"Training, {caption}", points, starts, unit_of_r)
        panels.append(TrainingPanel(label, caption, chart))
    return panels


def _one_after_the_other(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[tuple[int, float | None, float | None]], list[tuple[int, int]]]:
    """(step of the run, r of real, r of generated), and (first step, number) of each round.

    Steps may count anew in each round.
    """
    points: list[tuple[int, float | None, float | None]] = []
    starts: list[tuple[int, int]] = []
    for round_ in sorted({row["round"] for row in rows}):
        of_round = sorted((row for row in rows if row["round"] == round_), key=lambda row: row["step"])
        before = points[-1][0] if points else 0
        shift = before if of_round[0]["step"] <= before else 0
        starts.append((before, round_))
        if points:
            points.append((before, None, None))  # no line from the end of a round to the start of the next
        points += [(shift + row["step"], row["r_real"], row["r_generated"]) for row in of_round]
    return points, starts


def event_rows(results: Results) -> list[EventRow]:
    """What the rules of health said while the models were trained, in the order in which it was said."""
    events = results.get("training_events", [])[: tables.MAX_LISTED]
    named = wording.labels(wording.distinct([event["model"] for event in events]))
    return [
        EventRow(
            named[event["model"]], event["round"], f"{event['step']:,}", wording.shortened(event["rule"], 60).short,
            wording.STATES["alarm" if event["action"] == "roll_back" else "warn"], _outcome(event),
            wording.shortened(event["sentence"], 600),
        )
        for event in events
    ]  # fmt: skip


_PHASES = {
    "generated": "draw the opponent\u2019s samples", "cached": "encode them", "probed": "look for shortcuts",
    "trained": "train the player", "evaluated": "evaluate", "overhead": "everything else",
}  # fmt: skip


def ledger_rows(results: Results) -> list[LedgerRow]:
    """What each phase of each round took."""
    entries = results.get("ledger", [])[: tables.MAX_LISTED]
    named = wording.labels(wording.distinct([entry["model"] for entry in entries]))

    def shown(value: float | int | None, pattern: str, scale: float = 1.0) -> str:
        return "\u2013" if value is None else pattern.format(value * scale)

    def memory(entry: dict[str, Any]) -> str:
        found, planned = shown(entry["peak_memory_bytes"], "{:,.1f}", 1e-9), entry.get("predicted_memory_bytes")
        return found if planned is None else f"{found} (planned {shown(planned, '{:,.1f}', 1e-9)})"

    return [
        LedgerRow(
            named[entry["model"]], entry["round"], _PHASES[entry["phase"]], f"{entry['seconds']:,.1f}",
            shown(entry["predicted_seconds"], "{:,.1f}"), shown(entry["samples"], "{:,.0f}"),
            shown(entry["samples_per_second"], "{:,.3g}"), shown(entry["flops"], "{:,.3g}", 1e-12),
            shown(entry["matrix_share"], "{:.0%}"), memory(entry),
        )
        for entry in entries
    ]  # fmt: skip


def disk_line(results: Results) -> str:
    """The most that the run's folder held, beside what was planned; empty where nobody looked."""
    entries = results.get("ledger", [])
    held = [entry["disk_bytes"] for entry in entries if entry.get("disk_bytes") is not None]
    if not held:
        return ""
    planned = next((entry["predicted_disk_bytes"] for entry in entries if entry.get("predicted_disk_bytes")), None)
    aside = "" if planned is None else f" (planned {wording.size(planned)})"
    return f"On the disk the run's folder held at most {wording.size(max(held))}{aside}."


def _outcome(event: dict[str, Any]) -> str:
    if event["action"] == "warn":
        return "training went on"
    if event["action"] == "stop":
        return "the round ended here"
    step = event["weights_from_step"]
    return f"rolled back to step {step:,}" if step else "rolled back to the round's beginning"


def training_legend() -> list[tuple[Markup, str]]:
    """What the lines of training stand for."""
    return [
        (plots.legend_key(style, marker=False), f"{name} samples")
        for style, name in enumerate(("real", "generated"))
    ]  # fmt: skip


def measure_table(results: Results) -> MeasureTable | None:
    """What else was measured: a row per measure, a column per model."""
    measures = results.get("measures", [])
    if not measures:
        return None
    places = {model["name"]: place for place, model in enumerate(results["models"])}
    columns = wording.distinct([(m["model"], m["round"]) for m in measures])
    columns.sort(key=lambda column: places.get(column[0], len(places)))  # stable: the others in the order given
    columns = columns[: tables.MAX_LISTED]
    named = wording.labels(wording.distinct([model for model, _ in columns]))
    models = [model for model, _ in columns]
    heads = [named[model] + (f", round {round_}" if models.count(model) > 1 else "") for model, round_ in columns]
    rows = []
    for of_name in list(_by_name(measures).values())[: tables.MAX_LISTED]:
        digits = _decimals(of_name)
        known = {(m["model"], m["round"]): _measured(m, digits) for m in of_name if m["value"] is not None}
        rows.append(MeasureRow(_title(of_name[0]), _direction(of_name[0]), [known.get(column) for column in columns]))
    return MeasureTable(heads, rows)


def measure_curves(results: Results) -> list[tables.CurvePanel]:
    """Measures over the rounds, a panel per run and measure that it has in two rounds at least."""
    measures = [m for m in results.get("measures", []) if m["value"] is not None and m["round"] is not None]
    panels = []
    for run, of_run in _by_run(results, measures).items():
        for of_name in _by_name(of_run).values():
            points = sorted(((m["round"], m["value"], m["low"], m["high"]) for m in of_name), key=lambda p: p[0])
            if len({round_ for round_, *_ in points}) < 2:
                continue
            columns = [[math.nan if v is None else v for v in column] for column in zip(*points, strict=True)]
            chart = plots.round_curves(
                f"measure-{len(panels)}", "Measure over the rounds", [plots.Line(0, *columns)], "value", zero=False
            )
            title = _title(of_name[0]) + (f", {wording.shortened(run, 40).short}" if run else "")
            panels.append(tables.CurvePanel(title, "measure", _direction(of_name[0]), chart))
    return panels


def _by_run(results: Results, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run: "" for the base and the rounds of the evaluation, otherwise by the name of the model."""
    rounds = [m for m in results["models"] if m["role"] == "round"]
    # A round that is there twice belongs to two runs
    alone = len({m["round"] for m in rounds}) == len(rounds)
    one_run = {m["name"] for m in results["models"] if m["role"] in ("baseline", "round")} if alone else set()
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault("" if row["model"] in one_run else row["model"], []).append(row)
    return found


def _by_name(measures: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        found.setdefault(measure["name"], []).append(measure)
    return found


def _title(measure: dict[str, Any]) -> str:
    return wording.shortened(measure["title"] or measure["name"], 80).short


def _direction(measure: dict[str, Any]) -> str:
    return "neither way is better" if measure["better"] == "none" else f"{measure['better']} is better"


def _decimals(of_name: Sequence[dict[str, Any]]) -> int:
    """Decimals that show two digits of the narrowest interval, or four of the largest number where there is none."""
    widths = [m["high"] - m["low"] for m in of_name if m["low"] is not None and m["high"] is not None]
    narrowest = min((width / 2 for width in widths if width > 0), default=None)
    if narrowest is not None:
        return min(6, max(0, 1 - math.floor(math.log10(narrowest))))
    largest = max((abs(m["value"]) for m in of_name if m["value"] is not None), default=0.0)
    return 3 if largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))


def _measured(measure: dict[str, Any], digits: int) -> wording.Number:
    low, high = measure["low"], measure["high"]
    interval = "" if low is None or high is None else wording.interval_text(low, high, digits, False)
    return wording.Number(wording.plain(measure["value"], digits), interval)
