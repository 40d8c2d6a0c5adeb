"""Results in the terminal, in Markdown and in trackers: means and differences, and what is said below them."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.records import (
    AggregateEntry,
    ComparisonEntry,
    Results,
    Scale,
    guidance_scales,
    modality_of,
    scale_in_words,
)
from spin_diffusion.evaluation.statistics import Interval, decimals_of
from spin_diffusion.evaluation.verdicts import verdict

_T = TypeVar("_T")
_STYLES = {False: {1: "bold green", 0: "", -1: "bold red"}, True: {1: "bold", 0: "", -1: "bold"}}
_CAPTION = "Bold: mean and wins are both beyond chance (adjusted over all tables)."


def print_table(comparisons: Sequence[Comparison], console: Console | None = None) -> None:
    """One table per scorer: a line per model, for each guidance scale its mean and its difference to the baseline.

    Bold and green is a difference that `verdict` calls improved, bold and red one that it calls regressed; bold alone
    where neither is good (a drift score). A console too narrow for that gets the intervals on lines of their own, then
    one table per guidance scale.
    """
    console = console or Console()
    for scorer in _distinct(c.scorer for c in comparisons):
        of_scorer = [c for c in comparisons if c.scorer == scorer]
        scales = _distinct(c.guidance_scale for c in of_scorer)
        by_scale = [[c for c in of_scorer if c.guidance_scale == scale] for scale in scales]
        layouts = [
            [_rich_table(rows, separator) for rows in groups]
            for groups in ([of_scorer], by_scale)
            for separator in (" ", "\n")
        ]
        tables = next((tables for tables in layouts if all(_fits(table, console) for table in tables)), layouts[-1])
        for table in tables:
            console.print(table)


def _fits(table: Table, console: Console) -> bool:
    unlimited = console.options.update(max_width=10_000)
    return Measurement.get(console, unlimited, table).maximum <= console.width


def _rich_table(comparisons: list[Comparison], separator: str) -> Table:
    """`separator` stands between a number and its interval: a line break makes columns half as wide."""
    # Text and not str: rich would read the square brackets of a model's name as markup.
    table = Table(title=Text(_title(comparisons)), caption=Text(_CAPTION), title_justify="left", caption_justify="left")
    table.add_column("model")
    guidance_scales = _distinct(c.guidance_scale for c in comparisons)
    for scale in guidance_scales:
        heading = comparisons[0].modality.heading.format(scale_in_words(scale))
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("to baseline", justify="right", no_wrap=True)
    decimals = _decimals(comparisons)
    by_cell = {(c.model, c.guidance_scale): c for c in comparisons}
    for model in _distinct(c.model for c in comparisons):
        cells = [Text(model)]
        for scale in guidance_scales:
            comparison = by_cell.get((model, scale))
            if comparison is None:
                cells += [Text(), Text()]
                continue
            mean = Text(_mean(comparison.mean, decimals, separator))
            difference = Text(_difference(comparison.difference, decimals, separator))
            difference.stylize(_STYLES[comparison.role == "drift"][_direction(comparison)])
            cells += [mean, difference]
        table.add_row(*cells)
    return table


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """One table per scorer with everything `print_table` shows, and wins, ties, losses and p-values."""
    parts = []
    for scorer in _distinct(c.scorer for c in comparisons):
        of_scorer = [c for c in comparisons if c.scorer == scorer]
        decimals = _decimals(of_scorer)
        columns = of_scorer[0].modality.columns
        head = ["model", *columns, "mean", "to baseline", "win / tie / loss", "p"]
        parts += [f"**{_escaped(_title(of_scorer))}**", "", f"| {' | '.join(head)} |"]
        parts.append(f"|---|{'---:|' * (len(head) - 1)}")
        for c in of_scorer:
            difference = _difference(c.difference, decimals, " ")
            if _direction(c):
                difference = f"**{difference}**"
            counts = "" if c.wins is None else f"{c.wins} / {c.ties} / {c.losses}"
            p = "" if c.p_holm is None else "< 0.001" if c.p_holm < 0.001 else f"{c.p_holm:.3f}"
            mean = _mean(c.mean, decimals, " ")
            scale = [scale_in_words(c.guidance_scale).removeprefix("guidance ") for _ in columns]
            row = [_escaped(c.model), *scale, mean, difference, counts, p]
            parts.append(f"| {' | '.join(row)} |")
        note = f"{_CAPTION} p: the larger of the sign test's and the t-test's over prompts, adjusted by Holm."
        parts += ["", note, ""]
    return "\n".join(parts)


def _title(comparisons: list[Comparison]) -> str:
    sizes = _distinct(f"{c.num_prompts} prompts x {c.num_images} {c.modality.plural}" for c in comparisons)
    return f"{comparisons[0].scorer}: {', '.join(sizes)}, 95 % t-intervals over prompts, seeds shared"


def _mean(interval: Interval, decimals: int, separator: str) -> str:
    return f"{interval.mean:.{decimals}f}{separator}[{interval.low:.{decimals}f}, {interval.high:.{decimals}f}]"


def _difference(interval: Interval | None, decimals: int, separator: str) -> str:
    if interval is None:
        return "baseline"
    # Adding 0 makes a difference that rounds to nothing +0.00 and never -0.00.
    rounded = [round(value, decimals) + 0.0 for value in (interval.mean, interval.low, interval.high)]
    mean, low, high = (f"{value:+.{decimals}f}" for value in rounded)
    return f"{mean}{separator}[{low}, {high}]"


def _direction(c: Comparison) -> int:
    """1 if the score rose by the rule of `verdict`, -1 if it fell, 0 if neither is sure or there is no difference."""
    if c.difference is None:
        return 0
    assert c.p_holm is not None and c.wins is not None and c.losses is not None
    improved = verdict(c.difference, c.p_holm, c.wins - c.losses, drift=False)
    return {"improved": 1, "regressed": -1}.get(improved, 0)


def _decimals(comparisons: list[Comparison]) -> int:
    """Decimals that show two digits of the narrowest interval, the same for all numbers of a scorer; 6 at most."""
    intervals = [interval for c in comparisons for interval in (c.mean, c.difference) if interval is not None]
    half_widths = [(interval.high - interval.low) / 2 for interval in intervals if interval.high > interval.low]
    return decimals_of(min(half_widths, default=0.0), 2)


def _escaped(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _distinct(values: Iterable[_T]) -> list[_T]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(values))


# What is said below the tables, and told to trackers


def closing_lines(results: Results) -> list[str]:
    """Sentences for every guidance scale: who wins, and what `losses_of` says."""
    lines = []
    for scale in guidance_scales(results["protocol"]):
        at = "" if scale is None else f"At guidance {scale:g}: "
        lines += [at + place["sentence"] for place in results.get("ranking", []) if place["guidance_scale"] == scale]
        lines += losses_of(results, scale)
    return lines


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
    return metrics
