"""The held-out gap: what a player learnt that carries over to samples that it was not trained on.

For `space` the gap L(r = 0) - L on fresh samples is, in expectation, at most the generalised Jensen-Shannon divergence
between data and opponent (2 JSD for mu = 1; arXiv 2512.07175 calls the loss noise-contrastive): a gap of 0 means that
this opponent cannot be told from the data any more, or that the round only learnt its training samples by heart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from spin_diffusion.samples.pairs import Pairs
from spin_diffusion.selfplay.clustered import clustered_mean
from spin_diffusion.selfplay.game import Game, PairScores
from spin_diffusion.selfplay.objectives import Loss
from spin_diffusion.selfplay.record import GapRecord


@dataclass(frozen=True)
class Told:
    """How each held-out sample is told apart, in the order of the pairs.

    Attributes:
        gaps: loss(r = 0) - loss, in the loss's unit.
    """

    gaps: Sequence[float]
    r_real: Sequence[float]
    r_generated: Sequence[float]
    prompts: Sequence[str]


def tell_apart(
    game: Game, pairs: Pairs, loss: Loss, batch_size: int, seed: int, round_: int, accelerator: Accelerator
) -> Told:
    """Let all processes tell held-out samples apart with the game's player, each pair at one noise that is its own.

    Args:
        batch_size: real samples per forward pass.
    """

    def columns(scores: PairScores) -> list[Tensor]:
        at_zero = PairScores(
            scores.opponent_real, scores.opponent_generated, scores.opponent_real, scores.opponent_generated
        )
        return [loss(at_zero) - loss(scores), scores.r_real, scores.r_generated]

    rows, prompts = scored(game, pairs, len(pairs.ids), columns, batch_size, seed, round_, accelerator)
    gaps, r_real, r_generated = zip(*rows, strict=True)
    return Told(gaps, r_real, r_generated, prompts)


@torch.no_grad()
def scored(
    game: Game,
    pairs: Pairs,
    number: int,
    columns: Callable[[PairScores], list[Tensor]],
    batch_size: int,
    seed: int,
    round_: int,
    accelerator: Accelerator,
) -> tuple[list[tuple[float, ...]], list[str]]:
    """What `columns` makes of the scores of the first pairs of a round's stream, shared out among all processes: a row
    for each real sample, the mean of its generated ones, and its prompt."""
    places = list(range(number))[accelerator.process_index :: accelerator.num_processes]
    found: dict[int, tuple[tuple[float, ...], str]] = {}
    for start in range(0, len(places), batch_size):
        mine = places[start : start + batch_size]
        batch = pairs.batch(mine, seed, round_)
        values = torch.stack(columns(game.scores(game.player, batch).scores), dim=1)
        # Several generated samples of one real one are one observation
        rows = values.view(len(mine), -1, values.shape[1]).mean(dim=1).tolist()
        found |= dict(zip(mine, zip(map(tuple, rows), batch.prompts, strict=True), strict=True))
    everywhere = dict(sorted((place, one) for part in gather_object([found]) for place, one in part.items()))
    return [row for row, _ in everywhere.values()], [prompt for _, prompt in everywhere.values()]


def gap_of(told: Told) -> GapRecord:
    """The mean gap, with its 95 % t-interval over prompts."""
    number = len(told.gaps)
    return {
        **clustered_mean(told.gaps, told.prompts),
        "r_real": sum(told.r_real) / number,
        "r_generated": sum(told.r_generated) / number,
        "num_samples": number,
    }
