"""Models side by side: the difference of each score to a baseline on the same prompts and seeds, and the same within
parts of the prompts."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from spin_diffusion.evaluation.records import ComparisonEntry, PartedBy, PartEntry, Role, Scale
from spin_diffusion.evaluation.statistics import (
    Interval,
    holm,
    paired_difference,
    sign_test_p,
    t_test_p,
    win_rate,
    win_tie_loss,
)
from spin_diffusion.evaluation.verdicts import verdict

MIN_PROMPTS = 20
"""A part of the prompts with fewer than these gets no interval of its own."""
Scores = Mapping[tuple[str, Scale, str], np.ndarray]
"""(model, guidance scale, scorer) -> (prompts, samples): the same prompts and seeds in the same order for all."""
Lost = Mapping[tuple[str, Scale], frozenset[str]]
"""(model, guidance scale) -> ids of further prompts of which it lacks a sample or its score, so that they are in no
model's scores."""


def compare(scores: Scores, baseline: str, roles: Mapping[str, Role], lost: Lost) -> list[ComparisonEntry]:
    """Each model at each guidance scale by each scorer against the baseline; their tests are one family."""
    return _compared([(at, baseline) for at in scores if at[0] != baseline], scores, roles, lost)


def compare_others(scores: Scores, baseline: str, roles: Mapping[str, Role], lost: Lost) -> list[ComparisonEntry]:
    """Each pair of models but the baseline, the later one against the earlier; their tests are one family."""
    groups: dict[tuple[Scale, str], list[str]] = {}
    for model, scale, scorer in scores:
        if model != baseline:
            groups.setdefault((scale, scorer), []).append(model)
    pairs = [
        ((later, scale, scorer), earlier)
        for (scale, scorer), models in groups.items()
        for earlier, later in combinations(models, 2)
    ]
    return _compared(pairs, scores, roles, lost)


def _compared(
    pairs: Iterable[tuple[tuple[str, Scale, str], str]], scores: Scores, roles: Mapping[str, Role], lost: Lost
) -> list[ComparisonEntry]:
    """An entry for each (model, guidance scale, scorer) and the model that it is compared with."""
    entries: list[ComparisonEntry] = []
    for (model, scale, scorer), other in pairs:
        ours, theirs = scores[model, scale, scorer], scores[other, scale, scorer]
        difference = paired_difference(ours, theirs)
        wins, ties, losses = win_tie_loss(ours, theirs)
        # Whoever is ahead may be so because the prompts that it failed at are not compared
        lacks, others_lack = lost.get((model, scale), frozenset()), lost.get((other, scale), frozenset())
        if wins > losses:
            losses += len(lacks - others_lack)
        elif losses > wins:
            wins += len(others_lack - lacks)
        won = win_rate(wins, ties, losses)
        entries.append(
            ComparisonEntry(
                model=model,
                baseline=other,
                scorer=scorer,
                guidance_scale=scale,
                num_prompts=len(ours),
                difference=difference.mean,
                low=difference.low,
                high=difference.high,
                wins=wins,
                ties=ties,
                losses=losses,
                win_rate=won.mean,
                win_rate_low=won.low,
                win_rate_high=won.high,
                p=max(sign_test_p(wins, losses), t_test_p(ours, theirs)),
                p_holm=1.0,
                verdict="inconclusive",
            )
        )
    for entry, p_holm in zip(entries, holm([entry["p"] for entry in entries]).tolist(), strict=True):
        difference, lead = Interval(entry["difference"], entry["low"], entry["high"]), entry["wins"] - entry["losses"]
        entry["p_holm"] = p_holm
        entry["verdict"] = verdict(difference, p_holm, lead, roles[entry["scorer"]] == "drift")
    return entries


# Parts of the prompts


def breakdowns(
    models: Sequence[str],
    prompts: Mapping[Scale, Sequence[tuple[str, str]]],
    scores: Scores,
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
