"""Training curves and measures as results.json holds them: finite numbers, and no more points than a page can show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_CURVE_POINTS = 300
"""Points of a training curve that are kept of each model and round; more are averaged over equal windows of steps."""


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, None where a number is not finite: JSON has no others."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def thinned(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_CURVE_POINTS of each model and round: means over windows, each at the step where it ends."""
    by_curve: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in curves:
        by_curve.setdefault((row["model"], row["round"]), []).append(row)
    points = []
    for rows in by_curve.values():
        rows = sorted(rows, key=lambda row: row["step"])
        for part in np.array_split(np.arange(len(rows)), min(len(rows), MAX_CURVE_POINTS)):
            window = [finite(rows[place]) for place in part]
            points.append(window[-1] if len(window) == 1 else _mean_row(window))
    return points


def _mean_row(window: list[dict[str, Any]]) -> dict[str, Any]:
    mean = dict(window[-1])
    for name in mean.keys() - {"model", "round", "step"}:
        values = [row[name] for row in window if row.get(name) is not None]
        mean[name] = float(np.mean(values)) if values else None
    return mean
