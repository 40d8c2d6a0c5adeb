"""comparison.html: one page, offline, in the style of the evaluation's report."""

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from spin_diffusion.comparing.report.tables import (
    Table,
    by_round_table,
    failures,
    findings,
    how,
    mode_names,
    rounds_table,
    scores_table,
    seeds_table,
)
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.plots import Line, Point


@dataclass(frozen=True)
class Panel:
    """A world under one budget."""

    title: str
    findings: list[str]
    tables: list[Table]
    keys: list[tuple[Markup, str]]
    charts: list[tuple[str, Markup]]


def as_page(results: dict[str, Any]) -> str:
    """The page."""
    css = resources.files("spin_diffusion.evaluation.report").joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode("utf-8")).digest()).decode("ascii")
    worlds = [
        (world["name"], world["about"], [_panel(results, world, budget) for budget in world["budgets"]])
        for world in results["worlds"]
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = resources.files(__package__).joinpath("comparison.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        css=Markup(css),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        how=how(results),
        worlds=worlds,
        failures=failures(results),
    )


def _panel(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> Panel:
    name = f"{world['name']}-{budget['budget']}"
    rows = [(style, row) for style, row in enumerate(budget["rows"]) if row["state"] != "failed"]
    scorer = results["scorers"][results["scorer"]]
    charts = []
    curves = [(style, row) for style, row in rows if len(row.get("curve") or []) > 1]
    if curves:
        lines = [_line(style, row) for style, row in curves]
        label = (
            f"{scorer} over the rounds, validation prompts, guidance {world['usual_guidance']:g}; range of the seeds"
        )
        charts.append((label, plots.round_curves(f"rounds-{name}", label, lines, scorer, zero=False)))
    for mode, called in mode_names(world).items():
        points = [
            Point(style, row["gflops"], *(row["scores"][mode][key] for key in ("mean", "low", "high")))
            for style, row in rows
        ]
        if points:
            label = f"{scorer} against cost, {called}"
            charts.append((label, plots.cost_scatter(f"cost-{mode.replace(' ', '-')}-{name}", label, points, scorer)))
    kinds = (scores_table, by_round_table, rounds_table, seeds_table)
    found = [of(results, world, budget) for of in kinds]
    return Panel(
        f"Equal {budget['budget']}",
        findings(results, world, budget),
        [table for table in found if table is not None],
        [(plots.legend_key(style), row["method"]) for style, row in rows],
        charts,
    )


def _line(style: int, row: dict[str, Any]) -> Line:
    curve = row["curve"]
    return Line(
        style,
        [point["round"] for point in curve],
        [point["mean"] for point in curve],
        [min(point["seeds"]) for point in curve],
        [max(point["seeds"]) for point in curve],
    )
