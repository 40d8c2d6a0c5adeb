"""How much each noise level counts.

A weight multiplies a score, not a loss. For `sft` that is the same; in a margin objective it is the beta_t of
SPIN-Diffusion (arXiv 2402.10210), which stands inside the sigmoid.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.diffusion.noising import Noising


def snr(abar: Float[Tensor, " timesteps"]) -> Float[Tensor, " timesteps"]:
    """Signal-to-noise ratio abar / (1 - abar), 0 at the last timestep of a schedule with zero terminal SNR."""
    return abar / (1 - abar)


def min_snr(noising: Noising, gamma: float) -> Float[Tensor, " timesteps"]:
    """Min-SNR weights (arXiv 2303.09556, section 3.4), in (0, 1]: min(SNR, gamma) of the error in x_0.

    An error in epsilon is SNR times one in x_0, an error in v is SNR + 1 times one, so the weights here are
    min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).
    """
    ratio = snr(noising.abar)
    if noising.prediction_type == "epsilon":
        # Also at SNR = 0, where the quotient min(SNR, gamma) / SNR has the limit 1
        return (gamma / ratio.clamp(min=gamma)).clamp(max=1)
    return ratio.clamp(max=gamma) / (ratio + 1)


def stretched(weights: list[float], num_timesteps: int) -> Float[Tensor, " timesteps"]:
    """One weight per timestep from a few for equal sections of the schedule, the cleanest first."""
    section = torch.arange(num_timesteps) * len(weights) // num_timesteps
    return torch.tensor(weights)[section]


def timestep_weights(
    noising: Noising, snr_gamma: float | None, weights: list[float] | None
) -> Float[Tensor, " timesteps"]:
    """The product of both kinds of weights; 1 everywhere by default."""
    product = torch.ones(noising.num_timesteps)
    if snr_gamma is not None:
        product = product * min_snr(noising, snr_gamma)
    if weights is not None:
        product = product * stretched(weights, noising.num_timesteps)
    return product
