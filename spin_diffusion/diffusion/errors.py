"""From predictions to scores, in fp32 throughout: in bf16 an error's rounding exceeds the differences of interest.

And how much each noise level counts: a weight multiplies a score, not a loss. For `sft` that is the same; in a margin
objective it is the beta_t of SPIN-Diffusion (arXiv 2402.10210), which stands inside the sigmoid.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.diffusion.noising import Noising
from spin_diffusion.store.input_error import InputError

Images = Float[Tensor, "batch channels height width"]


def denoising_error(prediction: Images, target: Images) -> Float[Tensor, " batch"]:
    """Mean over channels, height and width of (target - prediction)^2; cast to fp32 before anything else."""
    return (target.float() - prediction.float()).square().mean(dim=(1, 2, 3))


def score(prediction: Images, target: Images) -> Float[Tensor, " batch"]:
    """Minus half the denoising error: the log-likelihood per element of a unit-variance Gaussian. Larger = better."""
    return -0.5 * denoising_error(prediction, target)


def winner_preserving_scale(
    prediction_real: Images, target_real: Images, prediction_generated: Images, target_generated: Images, mu: float
) -> Float[Tensor, " batch"]:
    """How much of the generated side's gradient may pass so that the real side does not get worse to first order.

    With g the gradient of each side's error in the space of predictions, lambda = clip((1 - mu) |g_real|^2 /
    <g_real, g_generated>, 0, 1) where the inner product is positive, else 1 (Diffusion-SDPO, arXiv 2511.03317).

    Args:
        mu: share of the real side's descent that must be kept, in [0, 1). 0 forbids only making it worse.

    Returns:
        lambda in [0, 1], without gradient.
    """
    g_real = (prediction_real.detach().float() - target_real.float()).flatten(1)
    g_generated = (prediction_generated.detach().float() - target_generated.float()).flatten(1)
    inner = (g_real * g_generated).sum(dim=1)
    allowed = (1 - mu) * g_real.square().sum(dim=1) / inner.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(inner > 0, allowed.clamp(0, 1), torch.ones_like(inner))


def scale_gradient(values: Float[Tensor, " batch"], scale: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """`values` unchanged, their gradient times `scale`."""
    return values.detach() + scale * (values - values.detach())


# Weights of noise levels

MIN_SNR_GAMMA = 5.0
"""The paper's."""
SPACES: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda abar: abar,
    "v": torch.ones_like,
    "x0": lambda abar: 1 - abar,
    "min_snr": lambda abar: torch.minimum(abar, MIN_SNR_GAMMA * (1 - abar)),
}
"""By the names of `--score_weighting`: how large a squared error is in a space, in parts of the same error in v.

x_t is given to the denoiser, so its errors obey sqrt(abar) d_x0 = -sqrt(1 - abar) d_eps, and with v = sqrt(abar) eps -
sqrt(1 - abar) x_0 (arXiv 2202.00512) d_eps = sqrt(abar) d_v and d_x0 = -sqrt(1 - abar) d_v. min_snr is min(SNR, 5)
d_x0^2 (arXiv 2303.09556, section 3.4), where SNR = abar / (1 - abar).
"""


def timestep_weights(noising: Noising, weighting: str | None) -> Float[Tensor, " timesteps"]:
    """What the squared error of the model's own prediction is multiplied with to count as in the space `weighting`.

    1 everywhere by default (None), and in the space that the model predicts in. Not normalised, so that a space means
    the same score for every model and schedule, with its beta: a mean of 1 over the timesteps would not keep the size
    of r, as errors of the clean levels and of the noisy ones differ by more than the weights do.

    Raises:
        InputError: v or x0 of a model that predicts the noise, on a schedule that leaves no signal at its end (zero
            terminal SNR): there an error in the noise says nothing of them, and the weight would be infinite. Of a
            model that predicts v all weights are finite; at the end epsilon and min_snr weigh 0, x0 weighs 1.
    """
    own = {"epsilon": "epsilon", "v_prediction": "v"}[noising.prediction_type]
    abar = noising.abar.double().clamp(min=1e-300)  # for the limits of 0 / 0; what has none is beyond fp32
    weights = (SPACES[weighting or own](abar) / SPACES[own](abar)).float()
    if not weights.isfinite().all():
        raise InputError(
            f"--score_weighting {weighting}: the model predicts the noise, and its last level leaves nothing of the "
            "image (zero terminal SNR), where an error in the noise says nothing of it: give epsilon or min_snr"
        )
    return weights
