"""Which earlier selves are the opponent.

To add a rule, write one function promoted rounds -> the rounds whose players play the opponent, each with
its share, 0 being the base; name it in OPPONENTS below and in `round_settings.OpponentName`.
"""

import math
from collections.abc import Callable

from spin_diffusion.store.run_dir import seed_from

Mixture = dict[int, float]
"""Round -> share of the samples that its player draws; the shares sum to 1."""


def latest(promoted: list[int]) -> Mixture:
    """The last promoted player (SPIN-Diffusion, arXiv 2402.10210, algorithm 1)."""
    return {promoted[-1] if promoted else 0: 1.0}


def base(promoted: list[int]) -> Mixture:
    """The base checkpoint in every round: new samples, but the opponent never gets better."""
    return {0: 1.0}


def last_two(promoted: list[int]) -> Mixture:
    """The last promoted player and its predecessor, half each, after the practice of SPIN (arXiv 2401.01335, section
    6: samples of the last two rounds). There the score stays anchored at the last one; here at the mixture."""
    selves = [0, *promoted][-2:]
    return {k: 1 / len(selves) for k in selves}


def pool(promoted: list[int]) -> Mixture:
    """All earlier selves alike, the base among them (SePPO, arXiv 2410.05255, draws from past checkpoints)."""
    selves = [0, *promoted]
    return {k: 1 / len(selves) for k in selves}


OPPONENTS: dict[str, Callable[[list[int]], Mixture]] = {
    "latest": latest,
    "base": base,
    "last_two": last_two,
    "pool": pool,
    # The moving average that was kept while the last promoted player was trained
    "ema": latest,
}


def member(mixture: Mixture, *sample: str | int) -> int:
    """Which round's player draws a sample: a function of the sample's parts (seed, round, prompt id, k) alone."""
    place, bound = seed_from("member", *sample) / 2**63, 0.0
    for round_, weight in sorted(mixture.items()):
        bound += weight
        if place < bound:
            return round_
    return max(mixture)


def describe(mixture: Mixture) -> str:
    """For people: "the base", "round 2", "half round 1, half round 2"."""
    names = {k: f"round {k}" if k else "the base" for k in sorted(mixture)}
    if len(names) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{weight:.0%} {names[k]}" for k, weight in sorted(mixture.items()) if not math.isclose(weight, 0))
