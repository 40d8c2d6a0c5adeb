"""Objectives: from the four scores of a pair to one loss per pair.

A score is the log-likelihood of a sample under a model, or its stand-in. For text it is the sum of the answer's token
log-probabilities in nats; for images it is -1/2 of the mean squared denoising error at one noise level, which is the
log-likelihood of a unit-variance Gaussian per element. That 1/2 makes `spin(scores, beta)` exactly the SPIN-Diffusion
and Diffusion-DPO loss -log sigmoid(-(beta/2) [...]), so published betas (2000, 5000) carry over unchanged. diffusers'
SD (not SDXL) DPO script leaves the 1/2 out: its `--beta_dpo 2500` is `--beta 5000` here.

To add an objective, write one function PairScores -> (batch,) losses and name it in OBJECTIVES below.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class PairScores:
    """Scores of a batch of pairs, fp32, larger = more likely. Only the player's two carry a gradient."""

    player_real: Float[Tensor, " batch"]
    player_generated: Float[Tensor, " batch"]
    opponent_real: Float[Tensor, " batch"]
    opponent_generated: Float[Tensor, " batch"]

    @property
    def r_real(self) -> Float[Tensor, " batch"]:
        """How much more likely the real sample is to the player than to the opponent."""
        return self.player_real - self.opponent_real

    @property
    def r_generated(self) -> Float[Tensor, " batch"]:
        """How much more likely the generated sample is to the player than to the opponent."""
        return self.player_generated - self.opponent_generated

    @property
    def margin(self) -> Float[Tensor, " batch"]:
        """r_real - r_generated: positive when the player has learnt to tell the real sample from the opponent's."""
        return self.r_real - self.r_generated


def spin(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """-log sigmoid(beta * margin) (SPIN, arXiv 2401.01335; SPIN-Diffusion, arXiv 2402.10210). ln 2 at margin 0.

    Only the difference of the two r counts: both may fall together, see `health`.
    """
    return softplus(-beta * scores.margin)


def space(scores: PairScores, mu: float = 1.0, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Noise-contrastive classification of each sample by itself (SPACE, arXiv 2512.07175).

    softplus(ln mu - beta r_real) + mu softplus(beta r_generated - ln mu), which is ln(1 + mu) + mu ln(1 + 1/mu) at
    r = 0. Unlike `spin` it pulls on the absolute r_real and r_generated.

    Args:
        mu: number of generated samples per real one. Several of one real sample come as several pairs, whose mean is
            the real term once and mu times the mean of the generated terms.
        beta: temperature on r. The paper has none (1); denoising errors need the size of SPIN-Diffusion's beta.
    """
    return softplus(math.log(mu) - beta * scores.r_real) + mu * softplus(beta * scores.r_generated - math.log(mu))


def dpo(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on human pairs: the generated side is the data set's worse image.

    Term for term the loss of `spin`; what differs is where the pair comes from.
    """
    return spin(scores, beta)


def sft(scores: PairScores) -> Float[Tensor, " batch"]:
    """Supervised fine-tuning: minus the player's score of the real sample. There is no opponent in it."""
    return -scores.player_real


def bco(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Binary classification of each sample by itself (BCO, arXiv 2404.04656, without its running shift of the reward).

    softplus(-beta r_real) + softplus(beta r_generated): `space` at mu = 1.
    """
    return softplus(-beta * scores.r_real) + softplus(beta * scores.r_generated)


def nca(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Noise-contrastive alignment, its form for pairs (NCA, arXiv 2402.05369).

    softplus(-beta r_real) + (softplus(beta r_real) + softplus(beta r_generated)) / 2: the real sample counts among the
    noise too, so one round solved exactly goes only half of the way that one of `space` goes.
    """
    real, generated = beta * scores.r_real, beta * scores.r_generated
    return softplus(-real) + 0.5 * softplus(real) + 0.5 * softplus(generated)


Loss = Callable[[PairScores], Float[Tensor, " batch"]]
"""An objective with its settings."""


class Objective(NamedTuple):
    """A loss and where its generated side comes from: the opponent draws it, the data set has it, or none is needed."""

    loss: Callable[..., Float[Tensor, " batch"]]
    generated: Literal["opponent", "data", "none"]


OBJECTIVES: dict[str, Objective] = {
    "spin": Objective(spin, "opponent"),
    "space": Objective(space, "opponent"),
    "bco": Objective(bco, "opponent"),
    "nca": Objective(nca, "opponent"),
    "dpo": Objective(dpo, "data"),
    "sft": Objective(sft, "none"),
}


def bind(name: str, **settings: float) -> Loss:
    """The objective called `name` with those of `settings` that it knows, ready to be applied to PairScores."""
    loss = OBJECTIVES[name].loss
    known = inspect.signature(loss).parameters
    return partial(loss, **{key: value for key, value in settings.items() if key in known})
