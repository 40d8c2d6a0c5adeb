"""comparison.md: the tables for a README."""

from typing import Any

from spin_diffusion.comparing.report.tables import (
    Table,
    Text,
    by_round_table,
    failures,
    findings,
    how,
    rounds_table,
    scores_table,
    seeds_table,
)


def as_markdown(results: dict[str, Any]) -> str:
    """All tables, what they say, and how they came about."""
    lines = ["# Comparison of methods", "", how(results), ""]
    for world in results["worlds"]:
        lines += [f"## {world['name']}", ""]
        if world["about"]:
            lines += [world["about"], ""]
        for budget in world["budgets"]:
            steps = f", {budget['total_steps']} optimizer steps" if budget["budget"] == "steps" else ""
            lines += [f"### Equal {budget['budget']}{steps}", "", " ".join(findings(results, world, budget)), ""]
            kinds = (scores_table, by_round_table, rounds_table, seeds_table)
            tables = [of(results, world, budget) for of in kinds]
            for table in tables:
                if table is not None:
                    lines += [*_table(table), ""]
    if failed := failures(results):
        lines += ["## Runs without an end", "", *(f"- {_escaped(line)}" for line in failed), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    lines = [f"| {' | '.join(table.head)} |", "|---|" + "---:|" * (len(table.head) - 1)]
    return lines + [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]


def _cell(cell: Text) -> str:
    text = _escaped(cell.text)
    return {"": text, "some": f"*{text}*", "sure": f"**{text}**"}[cell.weight]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
