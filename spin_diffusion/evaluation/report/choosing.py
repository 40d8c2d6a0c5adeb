"""The gallery: which prompts and seeds the page shows."""

import random
from dataclasses import dataclass

import numpy as np

from spin_diffusion.evaluation.report.reading import Evaluation

Pair = tuple[str, int]
"""(id of the prompt, number of the image or answer): the same seed for every model."""


@dataclass(frozen=True)
class Selection:
    """A tab of the gallery."""

    key: str
    title: str
    note: str
    pairs: list[Pair]
    why: dict[Pair, str]
    """Why a pair is there, where that is a number."""


def differences(
    scores: dict[tuple[str, str, str, int], float], scorer: str, baseline: str, candidate: str
) -> dict[Pair, float]:
    """Candidate minus baseline by one scorer, for each prompt and seed that both have, in order."""
    return {
        (id, k): score - base
        for (model, name, id, k), score in sorted(scores.items())
        if model == candidate and name == scorer and (base := scores.get((baseline, scorer, id, k))) is not None
    }


def choose(evaluation: Evaluation, random_pairs: int, ranked_pairs: int) -> list[Selection]:
    """The tabs: a random sample, which no score has chosen, then the extremes. A prompt is in each tab once.

    Pairs are ranked by the mean over the scorers of the paired difference in units of its standard deviation, so that
    no scorer counts more because its numbers are larger; a scorer of drift does not count.
    """
    results = evaluation.results
    baseline, candidate = results["baseline"], results["headline"]["model"]
    ids = sorted({(row.id, row.k) for row in evaluation.samples})
    # Drawn by the protocol: who evaluates cannot draw until he likes the sample
    drawn = _one_per_prompt(random.Random(results["protocol"]["id"]).sample(ids, len(ids)))
    num_prompts = len(drawn)
    shown = drawn[:random_pairs]
    note = f"{len(shown)} of {num_prompts} prompts, drawn by the protocol's id: no score has chosen them."
    selections = [Selection("random", "Random", note, shown, {})]
    if candidate is None or candidate == baseline:
        return selections

    judges = [s["name"] for s in results["scorers"] if s["state"] == "run" and s["role"] != "drift"]
    titles = {s["name"]: s["title"] for s in results["scorers"]}
    by_judge = {name: differences(evaluation.scores, name, baseline, candidate) for name in judges}
    by_judge = {name: _standardised(by_pair) for name, by_pair in by_judge.items() if by_pair}
    common = sorted(set.intersection(*(set(by_pair) for by_pair in by_judge.values()))) if by_judge else []
    mean = {pair: float(np.mean([by_pair[pair] for by_pair in by_judge.values()])) for pair in common}
    spread = {
        pair: max(b[pair] for b in by_judge.values()) - min(b[pair] for b in by_judge.values()) for pair in common
    }
    best = [pair for pair in sorted(common, key=lambda pair: -mean[pair]) if mean[pair] > 0]
    worst = [pair for pair in sorted(common, key=lambda pair: mean[pair]) if mean[pair] < 0]
    torn = [pair for pair in sorted(common, key=lambda pair: -spread[pair]) if spread[pair] > 0]
    unit = "mean over the scorers of the difference, in standard deviations"
    ranked = [
        ("wins", "Best wins", f"Where the candidate gains most ({unit}).", best),
        ("losses", "Worst losses", f"Where the candidate loses most ({unit}).", worst),
    ]
    of_mean = {pair: f"{mean[pair]:+.2f} sd" for pair in common}
    selections += [
        Selection(key, title, note, _one_per_prompt(pairs)[:ranked_pairs], of_mean)
        for key, title, note, pairs in ranked
    ]
    note = "Where the scorers differ most about what changed: look here for what one of them is blind to."
    disagreement = {pair: _disagreement(pair, by_judge, titles) for pair in torn}
    selections.append(Selection("torn", "Scorers disagree", note, _one_per_prompt(torn)[:ranked_pairs], disagreement))
    return selections


def _one_per_prompt(pairs: list[Pair]) -> list[Pair]:
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair[0], pair)
    return list(first.values())


def _standardised(by_pair: dict[Pair, float]) -> dict[Pair, float]:
    deviation = float(np.std(list(by_pair.values())))
    return {pair: difference / deviation if deviation > 0 else 0.0 for pair, difference in by_pair.items()}


def _disagreement(pair: Pair, by_judge: dict[str, dict[Pair, float]], titles: dict[str, str]) -> str:
    high = max(by_judge, key=lambda name: by_judge[name][pair])
    low = min(by_judge, key=lambda name: by_judge[name][pair])
    parts = [f"{titles[name][:40]} {by_judge[name][pair]:+.2f} sd" for name in (high, low)]
    return ", ".join(parts)
