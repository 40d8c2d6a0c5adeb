"""Forward diffusion: from latents x_0 to x_t, and the target a denoiser is asked for at x_t.

To add a prediction target, add one line to TARGETS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.sending import sent

Latents = Float[Tensor, "batch channels height width"]
Timesteps = Int[Tensor, " batch"]


def q_sample(x_0: Latents, eps: Latents, abar_t: Float[Tensor, " batch"]) -> Latents:
    """Noise x_0 to level t: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM, arXiv 2006.11239, eq. 4)."""
    return _per_sample(abar_t.sqrt()) * x_0 + _per_sample((1 - abar_t).sqrt()) * eps


def epsilon_target(x_0: Latents, eps: Latents, abar_t: Float[Tensor, " batch"]) -> Latents:
    """The noise itself (DDPM, arXiv 2006.11239, eq. 14)."""
    return eps


def v_target(x_0: Latents, eps: Latents, abar_t: Float[Tensor, " batch"]) -> Latents:
    """The velocity sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (progressive distillation, arXiv 2202.00512, section 4)."""
    return _per_sample(abar_t.sqrt()) * eps - _per_sample((1 - abar_t).sqrt()) * x_0


TARGETS: dict[str, Callable[[Latents, Latents, Float[Tensor, " batch"]], Latents]] = {
    "epsilon": epsilon_target,
    "v_prediction": v_target,
}


@dataclass(frozen=True)
class Noising:
    """A checkpoint's forward process, read from its scheduler's configuration.

    Attributes:
        abar: (timesteps,) cumulative signal power, fp32; the last is 0 under zero terminal SNR.
        prediction_type: a key of TARGETS.
    """

    abar: Float[Tensor, " timesteps"]
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        """Noise levels of the schedule."""
        return len(self.abar)

    def noised_and_target(self, x_0: Latents, eps: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        """x_t and what the denoiser should predict there, both fp32."""
        abar_t = sent(self.abar, x_0.device)[t]
        return q_sample(x_0, eps, abar_t), TARGETS[self.prediction_type](x_0, eps, abar_t)


def read_noising(scheduler_config: dict[str, object], where: str) -> Noising:
    """The forward process of a scheduler's configuration, zero terminal SNR included.

    Raises:
        InputError: a prediction type that is not supported.
    """
    prediction_type = str(scheduler_config.get("prediction_type", "epsilon"))
    if prediction_type not in TARGETS:
        raise InputError(
            f"{where}: its scheduler has prediction_type {prediction_type!r}, which is not supported "
            f"(supported: {', '.join(TARGETS)})"
        )
    scheduler = DDPMScheduler.from_config(dict(scheduler_config))
    return Noising(scheduler.alphas_cumprod.float(), prediction_type)


@dataclass(frozen=True)
class Draws:
    """What is random in a pair's scores; shared by both images of the pair and by both models.

    Attributes:
        t: timestep of each pair.
        eps: noise of each pair, fp32.
        dropped: whether the pair's caption is replaced by the empty one.
    """

    t: Timesteps
    eps: Latents
    dropped: list[bool]


def draw(seeds: list[int], shape: tuple[int, int, int], num_timesteps: int, drop_probability: float) -> Draws:
    """One (t, eps, dropped) per seed, always on the CPU so that they do not depend on the device.

    Sharing t and eps between the real and the generated image is a variance reduction (the objective does not need it).
    """
    ts, noises, dropped = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        ts.append(torch.randint(num_timesteps, (1,), generator=generator))
        dropped.append(torch.rand(1, generator=generator).item() < drop_probability)
        noises.append(torch.randn(shape, generator=generator))
    return Draws(torch.cat(ts), torch.stack(noises), dropped)


def _per_sample(values: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1 1 1"]:
    return values[:, None, None, None]
