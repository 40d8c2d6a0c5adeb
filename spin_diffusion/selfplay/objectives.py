"""Objectives: from the four scores of a pair to one loss per pair.

A score is the log-likelihood of a sample under a model, or its stand-in. For text it is the sum of the answer's token
log-probabilities in nats; for images it is -1/2 of the mean squared denoising error at one noise level, which is the
log-likelihood of a unit-variance Gaussian per element. That 1/2 makes `spin(scores, beta)` exactly the SPIN-Diffusion
and Diffusion-DPO loss -log sigmoid(-(beta/2) [...]), so published betas (2000, 5000) carry over unchanged. diffusers'
SD (not SDXL) DPO script leaves the 1/2 out: its `--beta_dpo 2500` is `--beta 5000` here.

With `--dropped_captions real` the player's score of the generated side of a pair without its caption is taken to be
the opponent's, so r_generated is 0 there and has no gradient: `spin` is softplus(-beta r_real), `space` and `ddo` lose
their second term but for a constant (DDO's alpha = 0 on such pairs), and at r = 0 every loss is what it always is.

To add an objective, write one function PairScores -> (batch,) losses and its line in `objective_names`; or name a file
of your own, `--objective FILE.py`, with such a function called `loss`. What it takes besides the scores and beta, a
user sets with `--objective_options`.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.named import load_named, raised


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


def ddo(scores: PairScores, alpha: float = 1.0, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Direct discriminative optimisation (DDO, arXiv 2503.01103): each sample classified by itself, sides weighed.

    softplus(-beta r_real) + alpha softplus(beta r_generated), which is (1 + alpha) ln 2 at r = 0. At alpha = 1 it is
    `space` at mu = 1 and BCO (arXiv 2404.04656) without its running shift of the reward. Above that the generated
    samples are pushed down alpha times as hard as the real ones are held up, which sharpens faster and misses more of
    the data. The paper sums the squared error of v (`--score_weighting v`) over channels, height and width, where our
    score is -1/2 of its mean: its beta times 2 * channels * height * width is ours.

    Args:
        alpha: weight of the generated side, >= 0; the paper's runs have 0.5 to 6.
    """
    return softplus(-beta * scores.r_real) + alpha * softplus(beta * scores.r_generated)


def nca(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """Noise-contrastive alignment, its form for pairs (NCA, arXiv 2402.05369).

    softplus(-beta r_real) + (softplus(beta r_real) + softplus(beta r_generated)) / 2: the real sample counts among the
    noise too, so one round solved exactly goes only half of the way that one of `space` goes.
    """
    real, generated = beta * scores.r_real, beta * scores.r_generated
    return softplus(-real) + 0.5 * softplus(real) + 0.5 * softplus(generated)


def hinge(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """max(0, 1 - beta * margin): one of the convex losses that SPIN's theory allows (arXiv 2401.01335, section 4).

    Unlike `spin` it lets go of a pair whose margin is large enough.
    """
    return relu(1 - beta * scores.margin)


def ipo(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """(beta * margin - 1/2)^2 (IPO, arXiv 2310.12036, eq. 17): the margin has a goal, 1 / (2 beta), and no more.

    That is beta^2 times the paper's (margin - 1 / (2 beta))^2. The factor moves no minimum, and without it the
    gradients at image-sized betas would drown in Adam's epsilon.
    """
    return (beta * scores.margin - 0.5).square()


def sspo(scores: PairScores, beta: float = 1.0) -> Float[Tensor, " batch"]:
    """The sign rule of SePPO (arXiv 2410.05255): -log sigmoid(beta (r_real - s r_generated)).

    s = 1 where the player already models the real sample better than the opponent does (r_real > 0), and -1 elsewhere:
    there the generated sample, likely as good as the real one, is pulled up with it instead of pushed down.
    """
    sign = torch.where(scores.r_real.detach() > 0, 1.0, -1.0)
    return softplus(-beta * (scores.r_real - sign * scores.r_generated))


def kto(
    scores: PairScores, beta: float = 1.0, real_weight: float = 1.0, generated_weight: float = 1.0
) -> Float[Tensor, " batch"]:
    """Utility of each sample by itself (Diffusion-KTO, arXiv 2404.04465, eq. 8, with its sigmoid utility).

    real_weight (1 - sigmoid(beta (r_real - z))) + generated_weight (1 - sigmoid(beta (z - r_generated))), where the
    point of reference z = max(0, mean r) is taken over the pairs at hand and has no gradient. Diffusion-KTO's r is
    twice ours: its beta 5000 is 10000 here.

    Args:
        real_weight, generated_weight: of the two sides, to weigh gains against losses.
    """
    z = torch.cat([scores.r_real, scores.r_generated]).mean().detach().clamp(min=0)
    real = torch.sigmoid(-beta * (scores.r_real - z))
    generated = torch.sigmoid(-beta * (z - scores.r_generated))
    return real_weight * real + generated_weight * generated


def mapo(scores: PairScores, weight: float = 0.1, snr: float = 0.5, steps: float = 1000.0) -> Float[Tensor, " batch"]:
    """Margin-aware preference optimisation (MaPO, arXiv 2406.06424), for denoising errors; there is no opponent in it.

    e_real - weight * log sigmoid(steps (h(e_real) - h(e_generated))), where e = -2 score is the denoising error
    and h(e) = snr e / (exp(snr e) - 1), which falls from 1 at e = 0.

    Args:
        weight: of the margin beside the real side's error.
        snr: curvature of h.
        steps: factor of the margin, the length of the noise schedule in the paper's code.
    """

    def h(error: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        x = (snr * error).clamp(min=1e-6)  # the limit at 0 is 1, the quotient is not
        return x / torch.expm1(x)

    real, generated = -2 * scores.player_real, -2 * scores.player_generated
    return real - weight * logsigmoid(steps * (h(real) - h(generated)))


def dro(scores: PairScores, threshold: float = 0.001) -> Float[Tensor, " batch"]:
    """Denoising ranking (Diffusion-DRO, arXiv 2510.18353): max(0, threshold + d_real - d_generated), no sigmoid.

    d = -2 r is how much larger the player's denoising error is than the reference's, which in the paper is the base
    (`--anchor base`). The paper takes the generated side on the policy's own denoising steps, rolled out anew at every
    step, with its own prediction as the target; here both sides are noised by the forward process.

    Args:
        threshold: difference of the errors that is enough; the paper's code has 0.001.
    """
    return relu(threshold - 2 * scores.margin)


Loss = Callable[[PairScores], Float[Tensor, " batch"]]
"""An objective with its settings."""


OF_EVERY = {"sft_weight": 0.0}
"""What `--objective_options` can set of every objective, with its default: see `with_anchor`."""


def loss_of(name: str) -> Callable[..., Float[Tensor, " batch"]]:
    """The function of an objective, by its name or from its file.

    Raises:
        InputError: a file whose `loss` does not map the scores of some pairs to one loss each.
    """
    if not name.endswith(".py"):
        return globals()[name]
    loss = load_named(__name__, name, "loss")
    zeros = torch.zeros(2)
    try:
        tried = loss(PairScores(zeros, zeros, zeros, zeros))
    except Exception as error:
        raise InputError(f"{name}: its loss cannot be computed: {raised(error)}") from error
    if not isinstance(tried, Tensor) or tried.shape != zeros.shape:
        got = list(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
        raise InputError(f"{name}: its loss must return one number for each pair, a tensor [2] for two, not {got}")
    return loss


def options_of(name: str) -> dict[str, float]:
    """What `--objective_options` can set of an objective, with its defaults."""
    parameters = list(inspect.signature(loss_of(name)).parameters.values())[1:]
    return OF_EVERY | {one.name: one.default for one in parameters if one.name != "beta"}


def options_for(name: str, options: dict[str, float] | None) -> dict[str, float]:
    """Those of some options that an objective has."""
    known = options_of(name)
    return {key: value for key, value in (options or {}).items() if key in known}


def bind(name: str, **settings: float) -> Loss:
    """The objective called `name` with those of `settings` that it knows, ready to be applied to PairScores."""
    loss = loss_of(name)
    known = inspect.signature(loss).parameters
    return partial(loss, **{key: value for key, value in settings.items() if key in known})


def with_anchor(loss: Loss, weight: float) -> Loss:
    """`loss` plus `weight` times that of `sft`, which holds the real side up."""
    return loss if weight == 0 else lambda scores: loss(scores) + weight * sft(scores)


def check_options(names: list[str], options: dict[str, float]) -> None:
    """Refuse options that none of the objectives has.

    Raises:
        InputError: names the option and those that there are, or what its value must be.
    """
    known = {key for name in names for key in options_of(name)}
    for key, value in options.items():
        if key not in known:
            there = ", ".join(sorted(known))
            raise InputError(f"--objective_options {key}: --objective {', '.join(names)} has {there}")
        if key == "mu" and value <= 0:
            raise InputError(f"--objective_options mu {value:g} must be above 0")
        if key == "sft_weight" and value < 0:
            raise InputError(f"--objective_options sft_weight {value:g} must be at least 0")
