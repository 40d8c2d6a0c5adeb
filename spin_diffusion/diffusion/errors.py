"""From predictions to scores, in fp32 throughout: in bf16 an error's rounding exceeds the differences of interest."""

import torch
from jaxtyping import Float
from torch import Tensor

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
