"""Results in the terminal, in Markdown and in trackers: means and differences, and what is said below them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spin_diffusion.evaluation.records import (
    IMAGES,
    AggregateEntry,
    ComparisonEntry,
    DifferenceEntry,
    DistanceEntry,
    DistributionEntry,
    Metric,
    Results,
    Scale,
    SweepEntry,
    SweptSetting,
    guidance_scales,
    modality_of,
    samples_per_prompt,
    scale_in_words,
)
from spin_diffusion.evaluation.statistics import Interval, decimals_of
from spin_diffusion.evaluation.verdicts import verdict
from spin_diffusion.samples.sampling import free_in_words

_STYLES = {False: {1: "bold green", 0: "", -1: "bold red"}, True: {1: "bold", 0: "", -1: "bold"}}
_CAPTION = "Bold: mean and wins are both beyond chance (adjusted over all tables)."
_Cells = dict[tuple[str, Scale], tuple[AggregateEntry, ComparisonEntry | None]]
"""(model, guidance scale) -> the mean by one scorer, and the difference to the baseline, which itself has none."""


def cells_of(results: Results) -> dict[str, _Cells]:
    """Scorer that was run -> the cells of its table."""
    compared = {(c["scorer"], c["model"], c["guidance_scale"]): c for c in results["comparisons"]}
    cells: dict[str, _Cells] = {}
    for mean in results["results"]:
        if mean["aggregate"] == "mean":
            at = mean["model"], mean["guidance_scale"]
            cells.setdefault(mean["scorer"], {})[at] = mean, compared.get((mean["scorer"], *at))
    return cells


def print_table(results: Results, console: Console | None = None) -> None:
    """One table per scorer: a line per model, for each guidance scale its mean and its difference to the baseline.

    Bold and green is a difference that `verdict` calls improved, bold and red one that it calls regressed; bold alone
    where neither is good (a drift score). A console too narrow for that gets the intervals on lines of their own, then
    one table per guidance scale.
    """
    console = console or Console()
    unlimited = console.options.update(max_width=10_000)
    scales = guidance_scales(results["protocol"])
    for scorer, cells in cells_of(results).items():
        layouts = [
            [_rich_table(results, scorer, cells, part, separator) for part in parts]
            for parts in ([scales], [[scale] for scale in scales])
            for separator in (" ", "\n")
        ]
        fitting = (
            tables
            for tables in layouts
            if all(Measurement.get(console, unlimited, table).maximum <= console.width for table in tables)
        )
        for table in next(fitting, layouts[-1]):
            console.print(table)
    if "distribution" in results and results["distribution"]["distances"]:
        console.print(_distance_table(results["distribution"]))


def distance_direction(entry: DistanceEntry) -> int:
    """1 if the interval of the difference to the baseline says better, -1 if it says worse, 0 if it holds 0 or if this
    is the baseline."""
    sign = -1 if entry["better"] == "lower" else 1
    return sign * ((entry.get("difference_low", 0.0) > 0) - (entry.get("difference_high", 0.0) < 0))


def distance_decimals(distances: Sequence[DistanceEntry]) -> dict[Metric, int]:
    """Decimals that show two digits of each metric's narrowest interval."""
    widths: dict[Metric, list[float]] = {}
    for entry in distances:
        widths.setdefault(entry["metric"], []).append((entry["high"] - entry["low"]) / 2)
    return {metric: decimals_of(min((w for w in all_ if w > 0), default=0.0), 2) for metric, all_ in widths.items()}


def distribution_title(compared: DistributionEntry) -> str:
    """What is compared with what."""
    return (
        f"Distribution of {compared['num_images']} pictures against {compared['num_real']} real ones "
        f"({compared['real']}), in {compared['width']} features of {compared['title']}"
    )


def _distance_rows(compared: DistributionEntry) -> dict[tuple[str, Scale], list[DistanceEntry]]:
    """(model, guidance scale) -> its metrics."""
    rows: dict[tuple[str, Scale], list[DistanceEntry]] = {}
    for entry in compared["distances"]:
        rows.setdefault((entry["model"], entry["guidance_scale"]), []).append(entry)
    return rows


def _distance_table(compared: DistributionEntry) -> Table:
    """A line per model and guidance scale; bold green and red where the interval of the difference excludes 0."""
    decimals, rows = distance_decimals(compared["distances"]), _distance_rows(compared)
    caption = (
        "Lower is better for fd and kid, higher for the others. Coloured: the interval of the difference to the "
        "baseline excludes 0."
    )
    title = Text(distribution_title(compared))
    table = Table(title=title, caption=Text(caption), title_justify="left", caption_justify="left")
    table.add_column("model")
    table.add_column("guidance", justify="right")
    for metric in decimals:
        table.add_column(metric, justify="right", no_wrap=True)
    for (model, scale), entries in rows.items():
        numbers = [
            Text(f"{entry['value']:.{decimals[entry['metric']]}f}", _STYLES[False][distance_direction(entry)])
            for entry in entries
        ]
        table.add_row(Text(model), "given" if scale is None else f"{scale:g}", *numbers)
    return table


def _distances_as_markdown(compared: DistributionEntry) -> list[str]:
    """A table with each metric and, in brackets behind it, its difference to the baseline."""
    decimals = distance_decimals(compared["distances"])
    head = ["model", "guidance", *decimals]
    parts = [f"**{in_cell(distribution_title(compared))}**", "", f"| {' | '.join(head)} |"]
    parts.append(f"|---|{'---:|' * (len(head) - 1)}")
    for (model, scale), entries in _distance_rows(compared).items():
        cells = []
        for entry in entries:
            digits = decimals[entry["metric"]]
            cell = f"{entry['value']:.{digits}f}"
            if "difference" in entry:
                apart = Interval(entry["difference"], entry["difference_low"], entry["difference_high"]).signed(digits)
                cell += f" (**{apart}**)" if distance_direction(entry) else f" ({apart})"
            cells.append(cell)
        at = "given" if scale is None else f"{scale:g}"
        parts.append(f"| {in_cell(model)} | {at} | {' | '.join(cells)} |")
    note = (
        "fd, kid: lower is better; the others: higher. In brackets the difference to the baseline with its 95 % "
        "jackknife interval, bold where it excludes 0."
    )
    return [*parts, "", note, ""]


def _rich_table(results: Results, scorer: str, cells: _Cells, scales: Sequence[Scale], separator: str) -> Table:
    """`separator` stands between a number and its interval: a line break makes columns half as wide."""
    # Text and not str: rich would read the square brackets of a model's name as markup.
    cells = {at: cell for at, cell in cells.items() if at[1] in scales}
    title = Text(_title(results, scorer, cells))
    table = Table(title=title, caption=Text(_CAPTION), title_justify="left", caption_justify="left")
    table.add_column("model")
    for scale in scales:
        heading = modality_of(results["protocol"]).heading.format(scale_in_words(scale))
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("to baseline", justify="right", no_wrap=True)
    drifts = any(entry["name"] == scorer and entry["role"] == "drift" for entry in results["scorers"])
    decimals = score_decimals(results)[scorer]
    for model in dict.fromkeys(model for model, _ in cells):
        row = [Text(model)]
        for mean, compared in (cells[model, scale] for scale in scales):
            row.append(Text(_mean(mean, decimals, separator)))
            row.append(Text(_difference(compared, decimals, separator), _STYLES[drifts][score_direction(compared)]))
        table.add_row(*row)
    return table


def as_markdown(results: Results) -> str:
    """One table per scorer with everything `print_table` shows, and wins, ties, losses and p-values."""
    parts = []
    columns = modality_of(results["protocol"]).columns
    for scorer, cells in cells_of(results).items():
        decimals = score_decimals(results)[scorer]
        head = ["model", *columns, "mean", "to baseline", "win / tie / loss", "p"]
        parts += [f"**{in_cell(_title(results, scorer, cells))}**", "", f"| {' | '.join(head)} |"]
        parts.append(f"|---|{'---:|' * (len(head) - 1)}")
        for (model, scale), (mean, compared) in cells.items():
            difference, counts, p = _difference(compared, decimals, " "), "", ""
            if compared is not None:
                difference = f"**{difference}**" if score_direction(compared) else difference
                counts = f"{compared['wins']} / {compared['ties']} / {compared['losses']}"
                p = "< 0.001" if compared["p_holm"] < 0.001 else f"{compared['p_holm']:.3f}"
            at = [scale_in_words(scale).removeprefix("guidance ") for _ in columns]
            row = [in_cell(model), *at, _mean(mean, decimals, " "), difference, counts, p]
            parts.append(f"| {' | '.join(row)} |")
        note = f"{_CAPTION} p: the larger of the sign test's and the t-test's over prompts, adjusted by Holm."
        parts += ["", note, ""]
    if "distribution" in results and results["distribution"]["distances"]:
        parts += _distances_as_markdown(results["distribution"])
    for table in sweep_tables(results):
        parts += [f"**{in_cell(table.title)}**", "", f"| {' | '.join(table.head)} |", "|---|" + "---:|" * 2]
        parts += [f"| {' | '.join(row)} |" for row in table.rows] + [""]
    return "\n".join(parts)


@dataclass(frozen=True)
class SweepTable:
    """A sweep of a model's sampler as words."""

    title: str
    head: list[str]
    rows: list[list[str]]
    """The default first."""
    sentence: str
    """What the chosen setting gains on the prompts that did not choose it."""


def sweep_tables(results: Results) -> list[SweepTable]:
    """The table of each model's sweep."""
    return [_sweep_table(entry) for entry in results.get("sweep", [])]


def _sweep_table(entry: SweepEntry) -> SweepTable:
    default, best = entry["settings"][0], entry["settings"][entry["chosen"]]
    notes = {entry["chosen"]: " (chosen)", 0: " (default, chosen)" if entry["chosen"] == 0 else " (default)"}
    gain, other = entry["gain"], entry["to_baseline"]
    decimals = decimals_of((gain["high"] - gain["low"]) / 2, 2)
    rows = [
        [_free(row) + notes.get(place, ""), str(row["passes"]), f"{row['mean']:.{decimals}f}"]
        for place, row in enumerate(entry["settings"])
    ]
    on = f"on the {entry['num_held_out']} prompts that did not choose"
    lower = entry.get("better") == "lower"
    verb, by = ("changes by", f"{entry['scorer']} (lower is better)") if lower else ("gains", entry["scorer"])
    if entry["chosen"] == 0:
        sentence = f"{entry['model']}: no setting of the sampler beats the default ({_free(default)}) by {by}"
    else:
        sentence = (
            f"{entry['model']} {verb} {_signed(gain, decimals)} by {by} without any training, with "
            f"{_free(best)} in place of {_free(default)}, {on}, at {best['passes'] / default['passes']:.2g} times the "
            "passes"
        )
    if other is not None:
        sentence += (
            f"; at its best it is {_signed(other, decimals)} to {entry['baseline']} at its own best, which is what "
            f"training gained"
        )
    title = f"{entry['model']}: settings of the sampler, {entry['num_selection']} prompts that choose"
    return SweepTable(title, ["setting", "passes", entry["scorer"]], rows, sentence + ".")


def _free(setting: SweptSetting) -> str:
    return free_in_words(setting["guidance_scale"], setting["num_inference_steps"], setting["prediction_scale"])


def _signed(entry: DifferenceEntry, decimals: int) -> str:
    return Interval(entry["difference"], entry["low"], entry["high"]).signed(decimals)


def _title(results: Results, scorer: str, cells: _Cells) -> str:
    what = f"{samples_per_prompt(results['protocol'])} {modality_of(results['protocol']).plural}"
    sizes = dict.fromkeys(f"{mean['num_prompts']} prompts x {what}" for mean, _ in cells.values())
    return f"{scorer}: {', '.join(sizes)}, 95 % t-intervals over prompts, seeds shared"


def _mean(mean: AggregateEntry, decimals: int, separator: str) -> str:
    return f"{mean['mean']:.{decimals}f}{separator}[{mean['low']:.{decimals}f}, {mean['high']:.{decimals}f}]"


def _difference(compared: ComparisonEntry | None, decimals: int, separator: str) -> str:
    if compared is None:
        return "baseline"
    return Interval(compared["difference"], compared["low"], compared["high"]).signed(decimals, separator)


def score_direction(compared: ComparisonEntry | None) -> int:
    """1 if the score rose by the rule of `verdict`, -1 if it fell, 0 if neither is sure or there is no difference."""
    if compared is None:
        return 0
    difference = Interval(compared["difference"], compared["low"], compared["high"])
    said = verdict(difference, compared["p_holm"], compared["wins"] - compared["losses"], drift=False)
    return {"improved": 1, "regressed": -1}.get(said, 0)


def score_decimals(results: Results) -> dict[str, int]:
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
        found[scorer["name"]] = decimals_of(narrowest or 0.0, 2)
    return found


def in_cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


# What is said below the tables, and told to trackers


def closing_lines(results: Results) -> list[str]:
    """Sentences for every guidance scale: alarms that went off, who wins, and what `losses_of` says; and what free
    settings gain."""
    lines = []
    for scale in guidance_scales(results["protocol"]):
        at = "" if scale is None else f"At guidance {scale:g}: "
        lines += [
            f"{at}Alarm {alarm['id']} for {alarm['model']}: {alarm['explanation']}"
            for alarm in results["alarms"]
            if (alarm["state"], alarm["guidance_scale"]) == ("alarm", scale)
        ]
        lines += [at + place["sentence"] for place in results.get("ranking", []) if place["guidance_scale"] == scale]
        lines += losses_of(results, scale)
    compared = results.get("distribution")
    if compared is not None and compared["left_out"]:
        lines.append(not_told(compared))
    return [*lines, *not_swept(results), *(table.sentence for table in sweep_tables(results))]


def not_swept(results: Results) -> list[str]:
    """A sentence for a run of pictures: what the settings of the sampler give without training is not in its numbers,
    as every combination would cost another evaluation of the base and of the rounds."""
    trained = any(model["role"] == "round" for model in results["models"])
    if trained and modality_of(results["protocol"]) is IMAGES and "sweep" not in results:
        return [
            "Other settings of the sampler (steps, guidance, --prediction_scale) may give the base a part of any gain "
            "without training: `spin-diffusion evaluate --sweep` tells, for the base and the rounds."
        ]
    return []


def not_told(compared: DistributionEntry) -> str:
    """Why metrics of the distribution are not there."""
    told = "all but fd is told" if compared["distances"] else "nothing is told"
    return f"Of the distribution {told}: {compared['left_out']}."


def losses_of(results: Results, scale: Scale) -> list[str]:
    """Sentences: which models lack samples at a guidance scale, and what is compared for it; whose are broken."""
    plural, at = modality_of(results["protocol"]).plural, "" if scale is None else f" at guidance {scale:g}"
    counts = [count for count in results.get("samples", []) if count["guidance_scale"] == scale]
    lost = [
        f"{count['model']} lacks {count['missing']} of {count['asked']} {plural}"
        + (f" and the scores of {count['unscored']}" if count["unscored"] else "")
        + f", of {count['prompts_lost']} prompts"
        for count in counts
        if count["prompts_lost"]
    ]
    sentences = []
    if lost:
        left = next((row["num_prompts"] for row in results["results"] if row["guidance_scale"] == scale), 0)
        sentences.append(
            f"Only {left} of {results['protocol']['prompt_set']['num_prompts']} prompts are compared{at}: "
            f"{'; '.join(lost)}. They are left out for every model, and those that are left may be easier ones."
        )
    if broken := [f"{count['broken']} of {count['model']}" for count in counts if count["broken"]]:
        sentences.append(f"Broken {plural} (of one colour, empty) count with their scores{at}: {', '.join(broken)}.")
    return sentences


def metrics_of(results: Results, model: str) -> dict[str, float]:
    """Means, differences and verdicts of one model, as numbers for trackers and for the round's record."""
    at_key = modality_of(results["protocol"]).at_key

    def name(entry: AggregateEntry | ComparisonEntry) -> str:
        scale = entry["guidance_scale"]
        return entry["scorer"] + at_key.format("given" if scale is None else f"{scale:g}")

    metrics: dict[str, float] = {}
    for entry in results["results"]:
        if entry["model"] == model and entry["aggregate"] == "mean":
            metrics[name(entry)] = entry["mean"]
    for compared in results["comparisons"]:
        if compared["model"] == model:
            metrics[f"{name(compared)}/difference"] = compared["difference"]
            metrics[f"{name(compared)}/win_rate"] = compared["win_rate"]
    for distance in results["distribution"]["distances"] if "distribution" in results else ():
        if distance["model"] == model:
            scale = distance["guidance_scale"]
            metrics[distance["metric"] + at_key.format("given" if scale is None else f"{scale:g}")] = distance["value"]
    return metrics
