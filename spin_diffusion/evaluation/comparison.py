"""Models side by side: each score with its interval, its difference to a baseline on the same prompts and seeds, and
the same within parts of the prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from spin_diffusion.evaluation.records import IMAGES, Modality, PartedBy, PartEntry, Role, Scale
from spin_diffusion.evaluation.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_difference,
    sign_test_p,
    t_test_p,
    win_tie_loss,
)

MIN_PROMPTS = 20
"""A part of the prompts with fewer than these gets no interval of its own."""


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

    Args:
        rows: among them the baseline's at each guidance scale by each scorer.
    """
    of_baseline = {(row.guidance_scale, row.scorer): row for row in rows if row.model == baseline}
    return _adjusted([_compare_row(row, of_baseline[row.guidance_scale, row.scorer]) for row in rows])


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


# Parts of the prompts


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
