"""comparison.md and comparison.html, from what stands in comparison.json alone: the same tables in both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from spin_diffusion.comparing.results import (
    BudgetResult,
    Comparison,
    Difference,
    Distances,
    Mean,
    MethodResult,
    WorldResult,
)
from spin_diffusion.comparing.settings import Mode
from spin_diffusion.evaluation.distribution import LOWER_IS_BETTER
from spin_diffusion.evaluation.records import FreeSettings
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.page import dress, environment
from spin_diffusion.evaluation.report.plots import Line
from spin_diffusion.evaluation.tables import in_cell
from spin_diffusion.samples.sampling import free_in_words
from spin_diffusion.store.run_dir import write_file


def write_reports(results: Comparison, output_dir: Path) -> list[Path]:
    """Write both and return their paths."""
    markdown, page = output_dir / "comparison.md", output_dir / "comparison.html"
    write_file(markdown, lambda part: part.write_text(as_markdown(results), encoding="utf-8"))
    write_file(page, lambda part: part.write_text(as_page(results), encoding="utf-8"))
    return [markdown, page]


# Tables


Weight = Literal["", "some", "sure"]
"""How much a difference says: nothing; its 95 % interval excludes 0; so does the one that holds with all others."""


@dataclass(frozen=True)
class Text:
    """One cell of a table."""

    text: str = ""
    weight: Weight = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """A table as words."""

    title: str
    head: list[str]
    rows: list[list[Text]]


def tables_of(results: Comparison, world: WorldResult, budget: BudgetResult) -> list[Table]:
    """What is said of a world under a budget, in tables."""
    kinds = {"": _scores_table, ": round by round": _by_round_table, ": rounds": _rounds_table, ": seeds": _seeds_table}
    title = f"{world['name']}, equal {budget['budget']}"
    made = {title + after: table(results, world, budget["rows"]) for after, table in kinds.items()}
    if (distances := budget.get("distances")) is not None and distances["rows"]:
        made[f"{title}: {distances['num_images']} images against {distances['title']}"] = _distance_table(
            distances, world
        )
    return [Table(title, *table) for title, table in made.items() if table is not None]


_Table = tuple[list[str], list[list[Text]]]


def _number(found: Mean | None, after: str = "") -> Text:
    """A mean, and how the pictures were drawn."""
    return Text("-") if found is None else Text(f"{found['mean']:.3f}{after}")


def _at(mode: Mode, best: FreeSettings | None, world: WorldResult) -> str:
    """The best settings of the sampler behind a mean: the guidance scale, and what else is not as usual."""
    if mode != "best" or best is None:
        return ""
    usual, scale = world["usual"], best["prediction_scale"]
    steps = (
        f", {best['num_inference_steps']} steps" if best["num_inference_steps"] != usual["num_inference_steps"] else ""
    )
    return f" at {best['guidance_scale']:g}{steps}" + (f", x {scale:g}" if scale != usual["prediction_scale"] else "")


def _difference(found: Difference | None) -> Text:
    """A difference with its interval."""
    if found is None:
        return Text("-")
    return Text(f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]", weight(found))


def weight(found: Difference) -> Weight:
    """How much a difference says."""
    adjusted = found["adjusted"] or (0, 0)
    if adjusted[0] > 0 or adjusted[1] < 0:
        return "sure"
    return "some" if found["low"] > 0 or found["high"] < 0 else ""


def _modes(world: WorldResult) -> dict[Mode, str]:
    """Names of the ways of drawing; one that equals another is left out."""
    usual = world["usual"]["guidance_scale"]
    names: dict[Mode, str] = {"guidance 1": "guidance 1", "usual": f"guidance {usual:g}", "best": "its best"}
    return {mode: name for mode, name in names.items() if mode != "guidance 1" or usual != 1}


def _to_reference(row: MethodResult, mode: Mode) -> Difference | None:
    return (row.get("to_reference") or {}).get(mode)


def _scores_table(results: Comparison, world: WorldResult, rows: Sequence[MethodResult]) -> _Table:
    """Every method after its last round, against the reference."""
    reference, modes, base = results["settings"]["reference"], _modes(world), world["base"]
    head = ["method", "rate", "steps", *(part for name in modes.values() for part in (name, f"to {reference}"))]
    first = [Text("base", is_number=False), Text(), Text("0")]
    for mode in modes:
        first += [_number(base["scores"][mode], _at(mode, base["best"], world)), Text()]
    table = [[*first, Text(), _number(base["diversity"]), Text("0"), Text("0")]]
    head += ["to the base at its best", "diversity", "GFLOPs", "seconds"]
    return head, table + [_method_row(row, world, modes, reference) for row in rows]


def rate_text(rate: float) -> str:
    """A learning rate with up to three digits, as in 1.25e-5."""
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _method_row(row: MethodResult, world: WorldResult, modes: dict[Mode, str], reference: str) -> list[Text]:
    choice = row["choice"]
    if row["state"] == "failed" or choice is None:
        why = (row["failures"] or ["no seed came to its end"])[0]
        blanks = [Text()] * (2 * len(modes) + 4)
        return [Text(row["method"], is_number=False), Text("-"), Text(f"failed: {why}", is_number=False), *blanks]
    seeds = f" ({len(row['seeds'])} seeds)" if row["state"] == "partly" else ""
    rate = rate_text(choice["learning_rate"]) + (" (edge)" if choice["at_edge"] else "")
    cells = [
        Text(row["method"] + seeds, is_number=False),
        Text(rate),
        Text(f"{row['rounds']} x {row['steps_per_round']}"),
    ]
    for mode in modes:
        cells.append(_number(row["scores"][mode], _at(mode, row["best"], world)))
        cells.append(Text() if row["method"] == reference else _difference(_to_reference(row, mode)))
    cells.append(_difference(row["to_base"]["best"]))
    return [*cells, _number(row["diversity"]), Text(f"{row['gflops']:.0f}"), Text(f"{row['seconds']:.0f}")]


def _distance_table(distances: Distances, world: WorldResult) -> _Table:
    """How far the pictures are from real ones; behind each number the difference to the base at its best."""
    rows, modes = distances["rows"], _modes(world)
    metrics = list(rows[0]["metrics"])
    head = [
        "method",
        "drawn at",
        *(f"{metric} ({'lower' if metric in LOWER_IS_BETTER else 'higher'})" for metric in metrics),
    ]
    table = []
    for row in rows:
        if row["mode"] in modes:
            cells = [Text(row["method"], is_number=False), Text(modes[row["mode"]], is_number=False)]
            for metric in metrics:
                value, apart = f"{row['metrics'][metric]['mean']:.3g}", row["to_base"].get(metric)
                if apart is None:
                    cells.append(Text(value))
                    continue
                said = f"{value} ({apart['mean']:+.2g} [{apart['low']:+.2g}, {apart['high']:+.2g}])"
                cells.append(Text(said, "some" if apart["low"] > 0 or apart["high"] < 0 else ""))
            table.append(cells)
    return head, table


def _seeds_table(results: Comparison, world: WorldResult, rows: Sequence[MethodResult]) -> _Table:
    """The difference to the reference of each seed by itself, and the other scorers."""
    reference, modes, others = results["settings"]["reference"], _modes(world), list(results["scorers"])[1:]
    head = ["method", *(f"{name}: to {reference}, by seed" for name in modes.values())]
    table = []
    for row in rows:
        if row["state"] != "failed":
            cells = [Text(row["method"], is_number=False)]
            for mode in modes:
                found = _to_reference(row, mode)
                cells.append(Text(", ".join(f"{value:+.3f}" for value in found["seeds"].values()) if found else ""))
            table.append(cells + [_number(row["other_scores"][other]["best"]) for other in others])
    return head + [f"{other} at {modes['best']}" for other in others], table


def _rounds_table(results: Comparison, world: WorldResult, rows: Sequence[MethodResult]) -> _Table | None:
    """The curves over the rounds; None where no method has more than one."""
    with_curve = [row for row in rows if len(row.get("curve") or []) > 1]
    if not with_curve:
        return None
    last = max(len(row["curve"]) for row in with_curve)
    rounds = [f"round {k}" for k in range(1, last + 1)]
    best = f"best round to {results['settings']['reference']}"
    return ["method", *rounds, "best round", "lost since", best], [
        [
            Text(row["method"], is_number=False),
            *(Text(f"{point['mean']:.3f}") for point in row["curve"]),
            *[Text()] * (last - len(row["curve"])),
            Text(str(row["best_round"])),
            Text(f"{row['drift']:+.3f}" if row["drift"] is not None else "-"),
            _difference((row.get("best_round_to_reference") or {}).get("best")),
        ]
        for row in with_curve
    ]


def _by_round_table(results: Comparison, world: WorldResult, rows: Sequence[MethodResult]) -> _Table | None:
    """The rounds that were scored on test prompts, against base and reference; None where only the last one was."""
    if not any(row.get("by_round") for row in rows):
        return None
    reference, modes, base = results["settings"]["reference"], _modes(world), world["base"]
    columns = [part for name in modes.values() for part in (name, "to base", f"to {reference}")]
    first = [Text("base", is_number=False), Text("0")]
    for mode in modes:
        first += [_number(base["scores"][mode], _at(mode, base["best"], world)), Text(), Text()]
    table = [first]
    for row in rows:
        for found in row.get("by_round", []):
            cells = [Text(row["method"], is_number=False), Text(str(found["round"]))]
            for mode in modes:
                against = found.get("to_reference")
                cells += [
                    _number(found["scores"][mode], _at(mode, row["best"], world)),
                    _difference(found["to_base"][mode]),
                    _difference(against[mode]) if against else Text(),
                ]
            table.append(cells)
    return ["method", "round", *columns], table


# Sentences


def findings(results: Comparison, world: WorldResult, budget: BudgetResult) -> list[str]:
    """What the base gains without training; who is ahead of the reference, who behind, and who is first, at each way of
    drawing; whatever it is."""
    reference, said, nobody = results["settings"]["reference"], _free_gain(world), "no method"
    every = "every other method"
    if lacking := incomplete(results, budget["rows"]):
        said.append(f"Not all was run. {' '.join(lacking)}")
        ended = [row["method"] for row in budget["rows"] if row["state"] != "failed" and row["method"] != reference]
        nobody = f"none of the methods with a result ({', '.join(ended) or 'there is none'})"
        every += " with a result"
    for mode, name in _modes(world).items():
        ahead, behind = _named(budget["rows"], mode, "sure", 1), _named(budget["rows"], mode, "sure", -1)
        where = {"best": "at the best settings of each"}.get(mode, f"at {name}")
        said.append(
            f"{where.capitalize()}, {', '.join(ahead) if ahead else nobody} "
            f"{'are' if len(ahead) > 1 else 'is'} ahead of {reference} by an interval that allows for all differences"
            + (f"; {', '.join(behind)} {'are' if len(behind) > 1 else 'is'} behind" if behind else "")
            + "."
        )
        perhaps = [
            f"{', '.join(methods)} {word}"
            for sign, word in ((1, "ahead"), (-1, "behind"))
            if (methods := _named(budget["rows"], mode, "some", sign))
        ]
        if perhaps:
            said.append(f"By its own 95 % interval alone, which may be chance: {'; '.join(perhaps)}.")
        if (first := budget["first"][mode]) and len(budget["rows"]) > 1:
            level = first["not_told_apart"]
            apart = f"not told apart from it: {', '.join(level)}" if level else f"it is ahead of {every}"
            said.append(f"The highest mean is that of {first['method']}; {apart}.")
    return said + _missed(world, budget)


def _missed(world: WorldResult, budget: BudgetResult) -> list[str]:
    """Which methods cover less of the real images than the base at its best; why metrics of that are not there."""
    distances, modes, fell = budget.get("distances"), _modes(world), []
    if distances is None:
        return []
    for row in distances["rows"]:
        lost = [
            f"{metric} {apart['mean']:+.2g}"
            for metric, apart in row["to_base"].items()
            if metric in ("recall", "coverage") and apart["high"] < 0
        ]
        if lost and row["mode"] in modes and row["method"] != "base":
            fell.append(f"{row['method']} at {modes[row['mode']]} ({', '.join(lost)})")
    said = (
        [f"Of the distance to real images not all is told: {distances['left_out']}."] if distances["left_out"] else []
    )
    if fell:
        said.append(
            f"Less of the real images than by the base at its best is covered by {'; '.join(fell)}: higher scores of "
            "theirs may come from fewer kinds of images, and are no improvement."
        )
    return said


def _free_gain(world: WorldResult) -> list[str]:
    """What the best settings of the sampler give the base for nothing; a sentence, if it has any."""
    best, modes = world["base"]["best"], _modes(world)
    gains = [
        f"{_difference(found).text} over {modes[mode]}"
        for mode, found in world["base"]["free_gain"].items()
        if found is not None and mode in modes
    ]
    if best is None or not gains:
        return []
    how = free_in_words(best["guidance_scale"], best["num_inference_steps"], best["prediction_scale"])
    times = best["passes"] / world["usual"]["passes"]
    return [
        f"Without any training the base gains {' and '.join(gains)} by its best settings of the sampler ({how}, at "
        f"{times:.2g} times the passes of the usual ones); what training gained beyond that is told by the differences "
        "to the base at its best."
    ]


def incomplete(results: Comparison, rows: Sequence[MethodResult]) -> list[str]:
    """Which methods have no result, and which have one of some seeds alone; a sentence each."""
    seeds, said = results["seeds"], []
    if failed := [row["method"] for row in rows if row["state"] == "failed"]:
        said.append(f"Without a result: {', '.join(failed)}.")
    for row in rows:
        if row["state"] == "partly":
            lacking = ", ".join(str(seed) for seed in seeds if seed not in row["seeds"])
            said.append(f"Of {row['method']} the runs with seed {lacking} are missing.")
    return said


def _named(rows: Sequence[MethodResult], mode: Mode, wanted: Weight, sign: int) -> list[str]:
    found = [(row["method"], _to_reference(row, mode)) for row in rows]
    return [method for method, said in found if said is not None and weight(said) == wanted and said["mean"] * sign > 0]


def how(results: Comparison) -> str:
    """How the numbers came about, in a few sentences."""
    settings, prompts, seeds = results["settings"], results["prompts"], results["seeds"]
    title = results["scorers"][results["scorer"]]
    grid = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    if settings["widen_rates"]:
        grid += f" and, where the best is at an edge, up to {settings['widen_rates']} beyond,"
    free = max((world["num_free"] for world in results["worlds"]), default=0)
    family = max((budget["differences"] for world in results["worlds"] for budget in world["budgets"]), default=0)
    by = ", by the distance of their pictures to real ones" if settings["sweep"]["by"] == "fd" else ""
    if len(seeds) == 1:
        intervals = "95 % intervals are over prompts: they speak of these runs only, not of how training varies"
    else:
        intervals = (
            "95 % intervals are for other seeds and other prompts (Student's t over both), and wide, since "
            f"{len(seeds)} seeds say little of how training varies"
        )
    return (
        f"{title} (mean, higher is better) on {prompts['test']['num']} test prompts with "
        f"{settings['images_per_prompt']} images each, {len(seeds)} training seeds ({', '.join(map(str, seeds))}). "
        f"Each method's learning rate (of {grid} unless it has a grid of its own), its best settings of the sampler "
        f"(of {free}, the base's too{by}) and its best round were chosen on {prompts['validation']['num']} other "
        f"prompts, rate and settings with seed {seeds[0]}; "
        "(edge) = the best rate is still the lowest or the highest tried. Differences are paired by prompt and seed; "
        f"their {intervals}. Italic = it excludes 0; bold = so does one that holds together with all other differences "
        f"of that world and budget: every method, round and way of drawing, to the base and to {settings['reference']} "
        f"(Bonferroni, {family} at most). Look at the seeds one by one. Equal compute counts the FLOPs of training, of "
        "drawing and of encoding images, not the choice of the rate and not the evaluation. Seconds are of one run "
        "while others ran beside it."
    ) + "".join([_told_of_distances(results), _took(results)])


def _told_of_distances(results: Comparison) -> str:
    """What the table of distances to real images has, where there is one."""
    budgets = [budget for world in results["worlds"] for budget in world["budgets"]]
    found = next((d for budget in budgets if (d := budget.get("distances")) is not None and d["rows"]), None)
    if found is None:
        return ""
    return (
        f" The table from fd to coverage compares the distribution of {found['num_images']} images of each seed with "
        f"{found['title']}; lower or higher = better. In brackets the difference to the base at its best, its 95 % "
        "interval for other prompts, real images and seeds; italic = it excludes 0."
    )


def _took(results: Comparison) -> str:
    """What all of it took, where that is known."""
    found = results.get("took")
    if found is None:
        return ""
    return (
        f" All {found['runs']} runs together, with their images and scores, took {found['seconds'] / 3600:.2g} hours "
        f"of processes, which --jobs shares out, and {found['cpu_seconds'] / 3600:.2g} hours of CPU."
    )


def failures(results: Comparison) -> list[str]:
    """All runs without an end, with their reasons."""
    said = []
    for world in results["worlds"]:
        said += [f"{world['name']}, base: {line}" for line in world["base"]["failures"]]
        for budget in world["budgets"]:
            for row in budget["rows"]:
                where = f"{world['name']}, equal {budget['budget']}, {row['method']}"
                said += [f"{where}: {line}" for line in row["failures"]]
    return said


# Files


def as_markdown(results: Comparison) -> str:
    """The tables for a README, what they say, and how they came about."""
    lines = ["# Comparison of methods", "", how(results), ""]
    for world in results["worlds"]:
        lines += [f"## {world['name']}", ""]
        if world["about"]:
            lines += [world["about"], ""]
        for budget in world["budgets"]:
            steps = f", {budget['total_steps']} optimizer steps" if budget["budget"] == "steps" else ""
            lines += [f"### Equal {budget['budget']}{steps}", "", " ".join(findings(results, world, budget)), ""]
            for table in tables_of(results, world, budget):
                lines += [f"| {' | '.join(table.head)} |", "|---|" + "---:|" * (len(table.head) - 1)]
                lines += [f"| {' | '.join(map(_markdown, row))} |" for row in table.rows]
                lines.append("")
    if failed := failures(results):
        lines += ["## Runs without an end", "", *(f"- {in_cell(line)}" for line in failed), ""]
    return "\n".join(lines)


def _markdown(cell: Text) -> str:
    stars = {"": "", "some": "*", "sure": "**"}[cell.weight]
    return stars + in_cell(cell.text) + stars


@dataclass(frozen=True)
class Panel:
    """A world under one budget, in the page."""

    title: str
    findings: list[str]
    tables: list[Table]
    keys: list[tuple[Markup, str]]
    charts: list[tuple[str, Markup]]


def as_page(results: Comparison) -> str:
    """One page, offline, in the style of the evaluation's report."""
    worlds = [
        (world["name"], world["about"], [_panel(results, world, budget) for budget in world["budgets"]])
        for world in results["worlds"]
    ]
    template = environment(__package__ or "").get_template("comparison.html.j2")
    return template.render(**dress(), how=how(results), worlds=worlds, failures=failures(results))


def _panel(results: Comparison, world: WorldResult, budget: BudgetResult) -> Panel:
    name = f"{world['name']}-{budget['budget']}"
    rows = [(style, row) for style, row in enumerate(budget["rows"]) if row["state"] != "failed"]
    scorer = results["scorers"][results["scorer"]]
    charts = []
    curves = [(style, row["curve"]) for style, row in rows if len(row.get("curve") or []) > 1]
    if curves:
        lines = [
            Line(
                style,
                [point["round"] for point in curve],
                [point["mean"] for point in curve],
                [min(point["seeds"]) for point in curve],
                [max(point["seeds"]) for point in curve],
            )
            for style, curve in curves
        ]
        label = (
            f"{scorer} over the rounds, validation prompts, guidance {world['usual']['guidance_scale']:g}; "
            "range of the seeds"
        )
        charts.append((label, plots.round_curves(f"rounds-{name}", label, lines, scorer, zero=False)))
    for mode, called in _modes(world).items():
        scores = [(style, row["gflops"], row["scores"][mode]) for style, row in rows]
        marks = [Line(style, [at], [s["mean"]], [s["low"]], [s["high"]]) for style, at, s in scores if s is not None]
        if marks:
            label = f"{scorer} against cost, {called}"
            charts.append((label, plots.cost_scatter(f"cost-{mode.replace(' ', '-')}-{name}", label, marks, scorer)))
    return Panel(
        f"Equal {budget['budget']}",
        findings(results, world, budget),
        tables_of(results, world, budget),
        [(plots.legend_key(style), row["method"]) for style, row in rows],
        charts,
    )
