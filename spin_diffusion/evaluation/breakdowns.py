"""The differences within parts of the prompts: their categories, and quarters by their length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_diffusion.evaluation.samples import Arrays, BySample, EvaluatedModel
from spin_diffusion.evaluation.statistics import paired_difference

MIN_PROMPTS = 20
"""A part of the prompts with fewer than these gets no interval of its own."""


def breakdowns(
    models: Sequence[EvaluatedModel],
    scales: Sequence[float | None],
    samples: BySample,
    arrays: Arrays,
    complete: dict[float | None, list[str]],
    ran: Sequence[str],
) -> list[dict[str, Any]]:
    """Differences within categories of prompts, and within quarters by the prompts' length.

    The intervals of one model by one scorer hold together at 95 % (Bonferroni over its parts that have one): of many
    parts some stand out by chance.
    """
    found = []
    for scale in scales:
        rows = {id_: row for (id_, _), row in samples[models[0].name, scale].rows.items()}
        parts = _parts([rows[id_] for id_ in complete[scale]])
        large = sum(len(places) >= MIN_PROMPTS for places in parts.values())
        for model in models[1:]:
            for name in ran:
                ours, theirs = arrays[model.name, scale, name], arrays[models[0].name, scale, name]
                for (by, value), places in parts.items():
                    mean, low, high = float((ours[places] - theirs[places]).mean()), None, None
                    if len(places) >= MIN_PROMPTS:
                        interval = paired_difference(ours[places], theirs[places], 1 - 0.05 / large)
                        low, high = interval.low, interval.high
                    found.append(
                        {"by": by, "value": value, "model": model.name, "scorer": name, "guidance_scale": scale,
                         "num_prompts": len(places), "difference": mean, "low": low, "high": high}
                    )  # fmt: skip
    return found


def _parts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """The places of the prompts in each category and in each quarter by length; a part that is everything is none."""
    categories = [row["category"] for row in rows]
    parts = {
        ("category", category): np.flatnonzero(np.array(categories) == category)
        for category in sorted(set(categories))
        if category
    }
    lengths = np.array([len(row["prompt"]) for row in rows])
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="nearest"))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        last = high == edges[-1]
        inside = (lengths >= low) & ((lengths <= high) if last else (lengths < high))
        parts["prompt length", f"{low} to {high if last else high - 1} characters"] = np.flatnonzero(inside)
    return {key: places for key, places in parts.items() if 0 < len(places) < len(rows)}
