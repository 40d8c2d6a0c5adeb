"""How the models were trained, and what was measured of them beside their scores: the page's section "Training"."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from spin_diffusion.evaluation.records import (
    CurveEntry,
    EventEntry,
    LedgerEntry,
    MeasureEntry,
    Results,
    SelectionEntry,
)
from spin_diffusion.evaluation.report import plots, wording
from spin_diffusion.evaluation.report.editions import Picture, edition_of, picture_at
from spin_diffusion.evaluation.report.plots import Panel
from spin_diffusion.evaluation.report.reading import Evaluation
from spin_diffusion.evaluation.report.wording import MAX_LISTED, Number, known
from spin_diffusion.evaluation.statistics import decimals_of

PHASES = {
    "generated": "draw the opponent\u2019s samples",
    "cached": "encode them",
    "probed": "look for shortcuts",
    "trained": "train the player",
    "judged": "judge its steps",
    "previewed": "draw previews",
    "evaluated": "evaluate",
    "overhead": "everything else",
}
LEGEND = [
    (plots.legend_key(style, marker=False), f"{name} samples") for style, name in enumerate(("real", "generated"))
]
"""What the lines of training stand for."""
MAX_ROUNDS = 12
"""Rounds of which judgements and previews are shown, the last ones."""
SHEET_SIDE_PX = 1600
_T = TypeVar("_T", CurveEntry, MeasureEntry, SelectionEntry)
_K = TypeVar("_K", str, tuple[str, int])
_Point = tuple[int, float | None, float | None]
"""(step of the run, r of real, r of generated); None leaves a gap in the line."""


@dataclass(frozen=True)
class MeasureRow:
    """A measure of every model."""

    title: str
    direction: str
    cells: list[Number | None]


@dataclass(frozen=True)
class MeasureTable:
    """All measures of all models."""

    labels: list[str]
    rows: list[MeasureRow]


def training_panels(results: Results) -> list[Panel]:
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
        steps, real, generated = points[-1]
        caption = (
            f"{len(starts)} round{'' if len(starts) == 1 else 's'}, {steps:,} steps; at the end r of real "
            f"{wording.significant(real)}, of generated {wording.significant(generated)}"
        )
        chart = plots.training_curves(f"training-{number}", f"Training, {caption}", points, starts, unit_of_r)
        panels.append(Panel(named[run] if run else "rounds of this run", chart, caption=caption))
    return panels


def selection_panels(results: Results) -> list[Panel]:
    """How the steps of each round were judged, a panel for each of the last ones."""
    panels: list[Panel] = []
    for (run, round_), rows in _grouped(results.get("selection", []), lambda row: (row["model"], row["round"])).items():
        means, lows, highs = (plots.with_gaps(row[name] for row in rows) for name in ("value", "low", "high"))
        line = plots.Line(0, [row["step"] for row in rows], means, lows, highs)
        chosen = next((row["step"] for row in rows if row["chosen"]), None)
        caption = "the player after training" if chosen is None else f"the player of step {chosen:,}"
        key, by = f"selection-{len(panels)}", wording.shortened(rows[0]["by"], 40).short
        axis = "gain" if rows[0].get("better", "higher") == "higher" else "change, lower is better"
        chart = plots.step_curve(key, f"Steps of round {round_}, {caption} was kept", line, chosen, axis)
        title = f"{wording.shortened(run, 40).short} round {round_}, judged by {by}"
        panels.append(Panel(title, chart, caption=f"{caption} was kept"))
    return panels[-MAX_ROUNDS:]


def preview_sheets(evaluation: Evaluation) -> list[tuple[str, Picture]]:
    """(round, its previews in one picture) of the last rounds that have any."""
    sheets = []
    for entry in evaluation.results.get("previews", [])[-MAX_ROUNDS:]:
        picture = picture_at(evaluation.directory, entry["file"], SHEET_SIDE_PX)
        if isinstance(picture, Picture):
            sheets.append((f"{wording.shortened(entry['model'], 40).short} round {entry['round']}", picture))
    return sheets


def _one_after_the_other(rows: Sequence[CurveEntry]) -> tuple[list[_Point], list[tuple[int, int]]]:
    """The points of a run, whose steps may count anew in each round; and (first step, number) of each round."""
    points: list[_Point] = []
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


def outcome(event: EventEntry) -> str:
    """What an event of the rules of health led to."""
    if event["action"] == "warn":
        return "training went on"
    if event["action"] == "stop":
        return "the round ended here"
    step = event["weights_from_step"]
    return f"rolled back to step {step:,}" if step else "rolled back to the round's beginning"


def memory(entry: LedgerEntry) -> str:
    """The peak memory of a phase in GB, beside what was planned."""
    planned = entry.get("predicted_memory_bytes")
    aside = "" if planned is None else f" (planned {known(planned, unit=1e9)})"
    return known(entry["peak_memory_bytes"], unit=1e9) + aside


def disk_line(results: Results) -> str:
    """The most that the run's folder held, beside what was planned; empty where nobody looked."""
    entries = results.get("ledger", [])
    held = [size for entry in entries if (size := entry.get("disk_bytes")) is not None]
    if not held:
        return ""
    planned = next((size for entry in entries if (size := entry.get("predicted_disk_bytes"))), None)
    aside = "" if planned is None else f" (planned {wording.size(planned)})"
    return f"On the disk the run's folder held at most {wording.size(max(held))}{aside}."


def measure_table(results: Results) -> MeasureTable | None:
    """What else was measured: a row per measure, a column per model."""
    measures = results.get("measures", [])
    if not measures:
        return None
    places = {model["name"]: place for place, model in enumerate(results["models"])}
    columns = wording.distinct([(m["model"], m["round"]) for m in measures])
    columns.sort(key=lambda column: places.get(column[0], len(places)))  # stable: the others in the order given
    columns = columns[:MAX_LISTED]
    models = [model for model, _ in columns]
    named = wording.labels(wording.distinct(models))
    heads = [named[model] + (f", round {round_}" if models.count(model) > 1 else "") for model, round_ in columns]
    rows = []
    for of_name in list(_grouped(measures, lambda measure: measure["name"]).values())[:MAX_LISTED]:
        digits = _decimals(of_name)
        numbers = {
            (m["model"], m["round"]): wording.number(m["value"], m["low"], m["high"], digits)
            for m in of_name
            if m["value"] is not None
        }
        rows.append(MeasureRow(_title(of_name[0]), _direction(of_name[0]), [numbers.get(column) for column in columns]))
    return MeasureTable(heads, rows)


def measure_curves(results: Results) -> list[Panel]:
    """Measures over the rounds, a panel per run and measure that it has in two rounds at least."""
    measures = [m for m in results.get("measures", []) if m["value"] is not None and m["round"] is not None]
    panels: list[Panel] = []
    for run, of_run in _by_run(results, measures).items():
        for of_name in _grouped(of_run, lambda measure: measure["name"]).values():
            of_name.sort(key=lambda m: m["round"] or 0)
            points = [(m["round"], m["value"], m["low"], m["high"]) for m in of_name]
            rounds, *columns = zip(*points, strict=True)
            if len(set(rounds)) < 2:
                continue
            lines = [plots.Line(0, list(rounds), *map(plots.with_gaps, columns))]
            chart = plots.round_curves(f"measure-{len(panels)}", "Measure over the rounds", lines, "value", zero=False)
            title = _title(of_name[0]) + (f", {wording.shortened(run, 40).short}" if run else "")
            panels.append(Panel(title, chart, direction=_direction(of_name[0])))
    return panels


def _by_run(results: Results, rows: Iterable[_T]) -> dict[str, list[_T]]:
    """The rows of each run: "" for the base and the rounds of the evaluation, otherwise by the name of the model."""
    rounds = [m for m in results["models"] if m["role"] == "round"]
    # A round that is there twice belongs to two runs
    alone = len({m["round"] for m in rounds}) == len(rounds)
    one_run = {m["name"] for m in results["models"] if m["role"] in ("baseline", "round")} if alone else set()
    return _grouped(rows, lambda row: "" if row["model"] in one_run else row["model"])


def _grouped(rows: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    groups: dict[_K, list[_T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _title(measure: MeasureEntry) -> str:
    return wording.shortened(measure["title"] or measure["name"], 80).short


def _direction(measure: MeasureEntry) -> str:
    return "neither way is better" if measure["better"] == "none" else f"{measure['better']} is better"


def _decimals(of_name: Sequence[MeasureEntry]) -> int:
    """Decimals that show two digits of the narrowest interval, or four of the largest number where there is none."""
    widths = [m["high"] - m["low"] for m in of_name if m["low"] is not None and m["high"] is not None]
    narrowest = min((width / 2 for width in widths if width > 0), default=None)
    if narrowest is not None:
        return decimals_of(narrowest, 2)
    return decimals_of(max((abs(m["value"]) for m in of_name if m["value"] is not None), default=0.0), 4)
