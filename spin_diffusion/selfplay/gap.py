"""The held-out gap: what a player learnt that carries over to samples that it was not trained on.

For `space` the gap L(r = 0) - L on fresh samples is, in expectation, at most the generalised Jensen-Shannon divergence
between data and opponent (2 JSD for mu = 1; arXiv 2512.07175 calls the loss noise-contrastive): a gap of 0 means that
this opponent cannot be told from the data any more, or that the round only learnt its training samples by heart.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy.stats import sem, t

from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.objectives import Loss, PairScores
from spin_diffusion.selfplay.pairs import Pairs


@torch.no_grad()
def held_out_gap(
    game: Game, pairs: Pairs, loss: Loss, batch_size: int, seed: int, round_: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Mean of loss(r = 0) - loss over held-out samples, in the loss's unit, with its 95 % t-interval over samples.

    Args:
        batch_size: real samples per forward pass.
    """
    places = list(range(len(pairs.ids)))[accelerator.process_index :: accelerator.num_processes]
    found: dict[int, tuple[float, float, float]] = {}
    for start in range(0, len(places), batch_size):
        mine = places[start : start + batch_size]
        scores = game.scores(game.player, pairs.batch(mine, seed, round_)).scores
        at_zero = PairScores(
            scores.opponent_real, scores.opponent_generated, scores.opponent_real, scores.opponent_generated
        )
        columns = [loss(at_zero) - loss(scores), scores.r_real, scores.r_generated]
        # Several generated samples of one real one are one observation
        rows = torch.stack(columns, dim=1).view(len(mine), -1, 3).mean(dim=1).tolist()
        found |= dict(zip(mine, map(tuple, rows), strict=True))
    gathered = gather_object([found])
    rows = dict(sorted((place, row) for part in gathered for place, row in part.items()))
    gaps, r_real, r_generated = zip(*rows.values(), strict=True)
    mean = sum(gaps) / len(gaps)
    # One sample says nothing of its spread; scipy's interval of a constant is nan
    error = float(sem(gaps)) if len(gaps) > 1 else float("nan")
    low, high = t.interval(0.95, len(gaps) - 1, mean, error) if error > 0 else (mean, mean)
    return {
        "mean": mean,
        "low": float(low),
        "high": float(high),
        "r_real": sum(r_real) / len(gaps),
        "r_generated": sum(r_generated) / len(gaps),
        "num_samples": len(gaps),
    }
