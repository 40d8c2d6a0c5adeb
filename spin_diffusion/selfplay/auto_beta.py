"""`--beta auto`: the beta of a round, from the size of its scores.

What beta is right depends on the size of a score, which is another for every model, resolution, kind of prediction and
weighting of noise levels (DDO, arXiv 2503.01103, searches it anew in every round). A pair is saturated, and stops to
push, at beta * margin = SATURATION. Beta is chosen so that this is where the margin has come to a share of the error
that the player starts with: an absolute margin says nothing, and with Adam, whose steps do not shrink with the loss,
nothing else holds a pair back before the model is spoilt.
"""

import math
from dataclasses import replace

from spin_diffusion.samples.pairs import Pairs
from spin_diffusion.selfplay.gap import scored
from spin_diffusion.selfplay.one_round import Round
from spin_diffusion.selfplay.tracking import SATURATION

SHARE = 0.25
"""The share of the mean error at which a margin saturates. It is safe, not the best: where a rate spoils nothing, a
smaller beta gains more."""
PAIRS = 256
"""The first of the round's stream, whose real samples are scored."""


def beta_of_score(score: float) -> float:
    """The beta at which a margin of SHARE of the mean score saturates, to three digits: beyond them the number of
    processes shows, whose batches round differently.

    Args:
        score: mean over real samples, below 0: minus half the weighted squared error, or log-probabilities in nats.
    """
    return float(f"{SATURATION / (SHARE * -score):.3g}")


def mean_score(round_: Round, pairs: Pairs) -> float:
    """The player's mean score of the first real samples of the round's stream.

    Raises:
        FloatingPointError: it is not finite, or 0: no beta follows.
    """
    number, batch_size = min(PAIRS, pairs.visited or len(pairs.ids)), round_.run.training.train_batch_size
    rows, _ = scored(
        round_.game,
        replace(pairs, per_step=1),
        number,
        lambda scores: [scores.player_real],
        batch_size,
        round_.settings.seed,
        round_.k,
        round_.accelerator,
    )
    mean = math.fsum(score for (score,) in rows) / number
    if not -math.inf < mean < 0:
        raise FloatingPointError(f"--beta auto: the real samples' mean score is {mean}: give --beta a number")
    return mean
