"""Models side by side: each score with its interval, and its difference to a baseline on the same prompts and seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spin_diffusion.evaluation.digits import decimals_of
from spin_diffusion.evaluation.modalities import IMAGES, Modality
from spin_diffusion.evaluation.records import Role, Scale
from spin_diffusion.evaluation.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_difference,
    sign_test_p,
    t_test_p,
    verdict,
    win_tie_loss,
)
from spin_diffusion.store.input_error import InputError

_T = TypeVar("_T")
_STYLES = {False: {1: "bold green", 0: "", -1: "bold red"}, True: {1: "bold", 0: "", -1: "bold"}}
_CAPTION = "Bold: mean and wins are both beyond chance (adjusted over all tables)."


@dataclass(frozen=True, eq=False)
class Row:
    """Scores of one model at one guidance scale by one scorer."""

    model: str
    guidance_scale: Scale
    scorer: str
    scores: np.ndarray
    """(prompts, samples): the same prompts and seeds in the same order for every model."""
    role: Role = "held-out"
    """What the scorer can say; a difference of a "drift" score is never good news."""
    modality: Modality = IMAGES
    """What was scored."""
    lost: frozenset[str] = frozenset()
    """Ids of further prompts of which this model lacks a sample or its score, so that they are in no model's scores."""


@dataclass(frozen=True)
class Comparison:
    """One model at one guidance scale by one scorer, against another, mostly the baseline, at the same scale."""

    model: str
    guidance_scale: Scale
    scorer: str
    num_prompts: int
    num_images: int
    """Samples per prompt."""
    mean: Interval
    difference: Interval | None
    """Model minus baseline, paired by prompt. None for the baseline, and so are the fields below."""
    wins: int | None
    """Prompts where the model scores higher. A prompt that only the model ahead has lost counts against it."""
    ties: int | None
    losses: int | None
    p: float | None
    """The larger p-value of the sign test of wins against losses and of the t-test of the mean, both two-sided."""
    p_holm: float | None = None
    """The same, adjusted by Holm over all tests that were made together."""
    role: Role = "held-out"
    """What the scorer can say."""
    modality: Modality = IMAGES
    """What was scored."""
    other: str = ""
    """The model that it is compared with."""


def compare(rows: Sequence[Row], baseline: str) -> list[Comparison]:
    """One Comparison with the baseline per row, in the order of the rows; their tests are one family.

    Raises:
        InputError: no row of the baseline at some guidance scale and scorer, a row twice, shapes that differ, scores
            that are not finite, or fewer than 2 prompts.
    """
    by_key: dict[tuple[str, Scale, str], Row] = {}
    for row in rows:
        key = (row.model, row.guidance_scale, row.scorer)
        if key in by_key:
            raise InputError(f"{_describe(row)} is there twice")
        if row.scores.ndim != 2:
            raise InputError(f"{_describe(row)}: scores must have shape (prompts, images), got {row.scores.shape}")
        by_key[key] = row

    comparisons = []
    for row in rows:
        base = by_key.get((baseline, row.guidance_scale, row.scorer))
        if base is None:
            models = ", ".join(dict.fromkeys(row.model for row in rows))
            raise InputError(f"{_describe(row)}: the baseline {baseline!r} has no such scores; there are {models}")
        try:
            comparisons.append(_compare_row(row, base))
        except ValueError as error:
            raise InputError(f"{_describe(row)} against {baseline!r}: {error}") from error
    return _adjusted(comparisons)


def compare_others(rows: Sequence[Row], baseline: str) -> list[Comparison]:
    """Each pair of models but the baseline, the later one against the earlier; their tests are one family.

    Args:
        rows: as in `compare`.
    """
    groups: dict[tuple[Scale, str], list[Row]] = {}
    for row in rows:
        if row.model != baseline:
            groups.setdefault((row.guidance_scale, row.scorer), []).append(row)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
    return _adjusted([_compare_row(later, earlier) for earlier, later in pairs])


def _compare_row(row: Row, base: Row) -> Comparison:
    num_prompts, num_images = row.scores.shape
    mean = mean_interval(row.scores)
    difference = wins = ties = losses = p = None
    if row is not base:
        difference = paired_difference(row.scores, base.scores)
        wins, ties, losses = win_tie_loss(row.scores, base.scores)
        # Whoever is ahead may be so because the prompts that it failed at are not compared
        if wins > losses:
            losses += len(row.lost - base.lost)
        elif losses > wins:
            wins += len(base.lost - row.lost)
        p = max(sign_test_p(wins, losses), t_test_p(row.scores, base.scores))
    compared = (num_prompts, num_images, mean, difference, wins, ties, losses, p)
    return Comparison(
        row.model, row.guidance_scale, row.scorer, *compared, role=row.role, modality=row.modality, other=base.model
    )


def _adjusted(comparisons: list[Comparison]) -> list[Comparison]:
    """With p_holm: all of them are one family of tests."""
    adjusted = iter(holm([c.p for c in comparisons if c.p is not None]).tolist())
    return [c if c.p is None else replace(c, p_holm=next(adjusted)) for c in comparisons]


def _describe(row: Row) -> str:
    at = row.modality.at.format(_scale(row.guidance_scale))
    return f"model {row.model!r}{at} by {row.scorer}"


def _scale(guidance_scale: Scale) -> str:
    return "pictures as given" if guidance_scale is None else f"guidance {guidance_scale:g}"


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
        heading = comparisons[0].modality.heading.format(_scale(scale))
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
            scale = [_scale(c.guidance_scale).removeprefix("guidance ") for _ in columns]
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
