"""The differences within parts of the prompts: their categories, and quarters by their length."""

from collections.abc import Mapping, Sequence

import numpy as np

from spin_diffusion.evaluation.records import PartedBy, PartEntry, Scale
from spin_diffusion.evaluation.statistics import paired_difference

MIN_PROMPTS = 20
"""A part of the prompts with fewer than these gets no interval of its own."""


def breakdowns(
    models: Sequence[str],
    prompts: Mapping[Scale, Sequence[tuple[str, str]]],
    scores: Mapping[tuple[str, Scale, str], np.ndarray],
    scorers: Sequence[str],
) -> list[PartEntry]:
    """Differences within categories of prompts, and within quarters by the prompts' length.

    The intervals of one model by one scorer hold together at 95 % (Bonferroni over its parts that have one): of many
    parts some stand out by chance.

    Args:
        models: the baseline first.
        prompts: guidance scale -> (text, category) of each prompt that counts.
        scores: (model, guidance scale, scorer) -> (prompts, samples).
    """
    entries: list[PartEntry] = []
    for scale, rows in prompts.items():
        parts = _parts(rows)
        large = sum(len(places) >= MIN_PROMPTS for places in parts.values())
        for model in models[1:]:
            for scorer in scorers:
                ours, theirs = scores[model, scale, scorer], scores[models[0], scale, scorer]
                for (by, value), places in parts.items():
                    mean, low, high = float((ours[places] - theirs[places]).mean()), None, None
                    if len(places) >= MIN_PROMPTS:
                        interval = paired_difference(ours[places], theirs[places], 1 - 0.05 / large)
                        low, high = interval.low, interval.high
                    entries.append(
                        {
                            "by": by,
                            "value": value,
                            "model": model,
                            "scorer": scorer,
                            "guidance_scale": scale,
                            "num_prompts": len(places),
                            "difference": mean,
                            "low": low,
                            "high": high,
                        }
                    )
    return entries


def _parts(prompts: Sequence[tuple[str, str]]) -> dict[tuple[PartedBy, str], np.ndarray]:
    """The places of the prompts in each category and in each quarter by length; a part that is everything is none."""
    categories = np.array([category for _, category in prompts])
    parts: dict[tuple[PartedBy, str], np.ndarray] = {
        ("category", category): np.flatnonzero(categories == category)
        for category in sorted(set(categories.tolist()))
        if category
    }
    lengths = np.array([len(text) for text, _ in prompts])
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="nearest"))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        last = high == edges[-1]
        inside = (lengths >= low) & ((lengths <= high) if last else (lengths < high))
        parts["prompt length", f"{low} to {high if last else high - 1} characters"] = np.flatnonzero(inside)
    return {key: places for key, places in parts.items() if 0 < len(places) < len(prompts)}
