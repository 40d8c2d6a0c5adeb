"""The trajectory objective of SPIN-Diffusion (arXiv 2402.10210): pairs of whole denoising trajectories, step by step.

A model's step is a Gaussian, p(x_prev | x_t) = N(a x_t + c eps_theta(x_t), sigma^2), with a and c given by the sampler.
So a true pair (x_t, x_prev) has one noise that would explain it, eps_tilde = (x_prev - a x_t) / c, and

    |x_prev - mu_theta|^2 = c^2 |eps_tilde - eps_theta|^2.

Hence a step has a score of the kind that all objectives take, -1/2 times the mean of (eps_tilde - eps_theta)^2: as in
practice, the paper's weight of a step, c^2 / (2 sigma^2), is left out.
`steps` takes one step of a pair at random (the paper's upper bound, on true reverse pairs), `exact` the mean over all,
so that a pair of trajectories makes one logit (eq. 4.8). `forward`, the practice and the default, needs none of this:
there both images are noised by the forward process.

The kept states are fp16. Their rounding comes into eps_tilde divided by c, which is small (0.02 to 0.1 in most of 50
steps of SD's schedule), but both models are held against the same eps_tilde, so that it all but cancels in r.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.diffusion.noising import Draws, Latents, draw
from spin_diffusion.selfplay.device import sent
from spin_diffusion.store.input_error import InputError

Trajectory = Float[Tensor, "batch states channels height width"]
"""The states x_T, ..., x_0 of a sampler, from the noise to the image: one more than it takes steps."""


@dataclass(frozen=True)
class SamplerSteps:
    """The steps of DDIM (arXiv 2010.02502, eq. 12), in the order in which they are taken; fp64.

    Attributes:
        t: (steps,) timesteps at which the model is asked.
        abar, abar_prev: (steps,) cumulative signal power before and after a step.
        sigma: (steps,) standard deviation of the noise that a step adds; 0 at eta 0.
    """

    t: Int[Tensor, " steps"]
    abar: Float[Tensor, " steps"]
    abar_prev: Float[Tensor, " steps"]
    sigma: Float[Tensor, " steps"]

    def __len__(self) -> int:
        return len(self.t)

    @property
    def a(self) -> Float[Tensor, " steps"]:
        """Factor of x_t in the mean of x_prev."""
        return (self.abar_prev / self.abar).sqrt()

    @property
    def c(self) -> Float[Tensor, " steps"]:
        """Factor of the predicted noise in the mean of x_prev; below 0."""
        direct = (1 - self.abar_prev - self.sigma**2).clamp(min=0).sqrt()
        return direct - (self.abar_prev * (1 - self.abar) / self.abar).sqrt()


def read_steps(scheduler: DDIMScheduler, num_inference_steps: int, eta: float) -> SamplerSteps:
    """The steps that a DDIM scheduler takes. Raises InputError: a schedule whose first step starts from pure noise
    (zero terminal SNR), where a and c are infinite."""
    scheduler.set_timesteps(num_inference_steps)
    config, all_abar = scheduler.config, scheduler.alphas_cumprod.double()
    t = torch.as_tensor(scheduler.timesteps).cpu().long()
    before = t - config.num_train_timesteps // num_inference_steps
    abar = all_abar[t]
    abar_prev = torch.where(before >= 0, all_abar[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    # diffusers writes abar = 2^-24 for a schedule rescaled to zero terminal SNR
    if abar.min() < 1e-6:
        raise InputError(
            "--trajectory exact and steps need a noise schedule that leaves some signal at its end, this checkpoint's "
            "leaves none (zero terminal SNR): take --trajectory forward"
        )
    variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    return SamplerSteps(t, abar, abar_prev, eta * variance.clamp(min=0).sqrt())


def _of(values: Float[Tensor, " steps"], step: Int[Tensor, " batch"], like: Latents) -> Float[Tensor, "batch 1 1 1"]:
    return sent(values[step].to(like.dtype), like.device)[:, None, None, None]


def implied_noise(x_t: Latents, x_prev: Latents, steps: SamplerSteps, step: Int[Tensor, " batch"]) -> Latents:
    """eps_tilde: the prediction with which the sampler's step from x_t would have had its mean at x_prev."""
    return (x_prev - _of(steps.a, step, x_t) * x_t) / _of(steps.c, step, x_t)


def posterior(x_0: Latents, x_t: Latents, noise: Latents, steps: SamplerSteps, step: Int[Tensor, " batch"]) -> Latents:
    """x_prev of the forward process given x_t and x_0 (DDIM, arXiv 2010.02502, eq. 7); `noise` is standard normal."""
    abar, abar_prev, sigma = (_of(values, step, x_0) for values in (steps.abar, steps.abar_prev, steps.sigma))
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    return abar_prev.sqrt() * x_0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise


def forward_trajectory(x_0: Latents, noises: Trajectory, steps: SamplerSteps) -> Trajectory:
    """The forward process of an image, from x_T down: x_T from q(x_T | x_0), then the posterior, step by step.

    Args:
        noises: standard normal, for x_T and then for each step; at eta 0 only the first matters.
    """
    first = torch.zeros(len(x_0), dtype=torch.long)
    abar = _of(steps.abar, first, x_0)
    states = [abar.sqrt() * x_0 + (1 - abar).sqrt() * noises[:, 0]]
    for number in range(len(steps)):
        states.append(posterior(x_0, states[-1], noises[:, number + 1], steps, first + number))
    return torch.stack(states, dim=1)


def as_noise(
    prediction: Latents, x_t: Latents, steps: SamplerSteps, step: Int[Tensor, " batch"], prediction_type: str
) -> Latents:
    """A model's prediction as predicted noise, fp32: eps itself, or sqrt(abar) v + sqrt(1 - abar) x_t."""
    if prediction_type == "epsilon":
        return prediction.float()
    abar = _of(steps.abar, step, x_t)
    return abar.sqrt() * prediction.float() + (1 - abar).sqrt() * x_t


def draw_steps(
    seeds: list[int], shape: tuple[int, ...], num_steps: int, kind: Literal["steps", "exact"], drop_probability: float
) -> Draws:
    """One draw per seed: which step `steps` takes, and noises of the forward process, of which `steps` needs two and
    `exact` one more than there are steps."""
    return draw(seeds, (2 if kind == "steps" else num_steps + 1, *shape), num_steps, drop_probability)


@dataclass(frozen=True)
class TruePair:
    """One step of each image of a batch: the real ones, then the generated ones.

    Attributes:
        x_t, x_prev: (rows, channels, height, width) states before and after the step.
        step: (rows,) which of the sampler's steps it is.
    """

    x_t: Latents
    x_prev: Latents
    step: Int[Tensor, " batch"]


def true_pairs(
    x_0: Latents, kept: Trajectory | None, draws: Draws, steps: SamplerSteps, kind: Literal["steps", "exact"]
) -> Iterator[TruePair]:
    """The steps that a batch is scored on: a drawn one for each pair, or all of them one after the other.

    Args:
        x_0: real latents.
        kept: the opponent's trajectories, one for each real latent, or for `steps` the two states around the drawn
            step alone; None = there is no generated side.
    """
    rows = torch.arange(len(x_0))
    forward = forward_trajectory(x_0, draws.eps, steps) if kind == "exact" else None
    for step in [draws.t] if forward is None else [torch.full_like(rows, n) for n in range(len(steps))]:
        if forward is None:
            abar = _of(steps.abar, step, x_0)
            x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * draws.eps[:, 0]
            x_prev = posterior(x_0, x_t, draws.eps[:, 1], steps, step)
        else:
            x_t, x_prev = forward[rows, step], forward[rows, step + 1]
        if kept is None:
            yield TruePair(x_t, x_prev, step)
        else:
            at = step if kept.shape[1] == len(steps) + 1 else torch.zeros_like(step)
            x_t, x_prev = torch.cat([x_t, kept[rows, at].float()]), torch.cat([x_prev, kept[rows, at + 1].float()])
            yield TruePair(x_t, x_prev, step.repeat(2))
