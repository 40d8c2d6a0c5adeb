"""Which earlier self is the opponent.

To add a rule, write one function (round, promoted rounds) -> round whose player plays the opponent, 0 being the base,
and name it in OPPONENTS below.
"""

from collections.abc import Callable


def latest(round_: int, promoted: list[int]) -> int:
    """The last promoted player (SPIN-Diffusion, arXiv 2402.10210, algorithm 1)."""
    return promoted[-1] if promoted else 0


def base(round_: int, promoted: list[int]) -> int:
    """The base checkpoint in every round: new samples, but the opponent never gets better."""
    return 0


OPPONENTS: dict[str, Callable[[int, list[int]], int]] = {"latest": latest, "base": base}
