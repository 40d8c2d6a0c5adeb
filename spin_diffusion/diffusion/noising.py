"""Forward diffusion: from latents x_0 to x_t, and the target a denoiser is asked for at x_t.

To add a prediction target, add one line to TARGETS.
"""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.selfplay.device import sent
from spin_diffusion.store.configuration import (
    Choice,
    Configuration,
    Keys,
    check_keys,
    is_number,
    is_whole,
    refuse_missing,
)
from spin_diffusion.store.input_error import InputError

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


_SCHEDULERS = (
    "DDIMParallelScheduler DDIMScheduler DDPMParallelScheduler DDPMScheduler DEISMultistepScheduler "
    "DPMSolverMultistepScheduler DPMSolverSDEScheduler DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler "
    "EulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler "
    "LMSDiscreteScheduler PNDMScheduler SASolverScheduler UniPCMultistepScheduler"
).split()
"""Samplers of diffusers for one and the same forward process: DDPM's, in steps. They differ in how they go back."""
_CHOICES = {
    # The files of Stable Diffusion 1.x are older than the key
    "prediction_type": Choice(tuple(TARGETS)),
    "timestep_spacing": Choice(("leading", "linspace", "trailing")),
    "beta_schedule": Choice(("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")),
    # The values that leave DDPM's process and the denoiser's inputs and outputs as they are
    "timestep_type": Choice(("discrete",)),
    "use_flow_sigmas": Choice((False, None)),
    "use_dynamic_shifting": Choice((False, None)),
    "variance_type": Choice(("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None)),
}


@functools.cache
def _scheduler_keys() -> Keys:
    """What is known of the configurations of schedulers."""
    kinds = [getattr(diffusers, name) for name in _SCHEDULERS]
    known = frozenset(name for kind in kinds for name in inspect.signature(kind).parameters)
    foreign = (
        "no scheduler of DDPM's process knows: if the model was trained with DDPM's noise remove it from "
        "scheduler_config.json, else the model is not supported"
    )
    return Keys((), known, _CHOICES, foreign=foreign)


def check_scheduler(config: Configuration, where: str, kind: str | None = None) -> None:
    """Refuse a scheduler's configuration that does not name a process of DDPM's, whole.

    Args:
        config: the file's content, without defaults of the library.
        where: what the user gave, and that it is its scheduler; it begins the message.
        kind: class that the pipeline names for it.

    Raises:
        InputError: another process, such as EDM's or flow matching; a key that is missing, unknown or out of range.
    """
    own = config.get("_class_name")
    kinds = [str(name) for name in (kind, own) if name is not None]
    for name in kinds:
        if name not in _SCHEDULERS:
            raise InputError(
                f"{where}, {name}, is not one of DDPM's noise, which training would add: models of EDM, flow matching "
                "and consistency distillation are not supported; give a base with DDIMScheduler, PNDMScheduler, "
                "EulerDiscreteScheduler or another of DDPM's"
            )
    if kind is not None and own != kind:
        raise InputError(
            f"{where} is {kind} by model_index.json and {own} by scheduler_config.json: name one class in both"
        )
    _check_betas(config, where)
    check_keys(config, _scheduler_keys(), where)
    steps, offset = config["num_train_timesteps"], config.get("steps_offset", 0)
    if not is_whole(offset) or not 0 <= offset < steps:
        raise InputError(f"{where} has steps_offset {offset!r}: it must be a whole number from 0 to below {steps}")
    if kinds:
        check_complete(config, getattr(diffusers, kinds[0]), f"{where}: scheduler_config.json")


def check_complete(config: Configuration, kind: type, where: str) -> None:
    """Refuse a configuration that was written by this version of diffusers, or a later one, and lacks keys of its
    class: diffusers writes all of them, so they were lost. A key that an older file lacks is younger than the file, and
    its default is what was computed before there was a choice."""
    if _release(config.get("_diffusers_version")) >= _release(diffusers.__version__):
        known = set(inspect.signature(kind).parameters) - {"args", "kwargs"}
        refuse_missing(sorted(known - set(config)), where)


def _release(version: object) -> tuple[int, ...]:
    """The first two numbers of a version, (0, 42) of "0.42.1.dev0"; () of what is none."""
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:2]) if isinstance(version, str) else ()


def _check_betas(config: Configuration, where: str) -> None:
    betas = config.get("trained_betas")
    needed = ["num_train_timesteps", *(["beta_start", "beta_end", "beta_schedule"] if betas is None else [])]
    example = (
        " (Stable Diffusion has beta_start 0.00085, beta_end 0.012, beta_schedule scaled_linear, num_train_timesteps "
        "1000)"
    )
    refuse_missing([key for key in needed if config.get(key) is None], where, example)
    steps = config["num_train_timesteps"]
    if not is_whole(steps) or steps < 1:
        raise InputError(f"{where} has num_train_timesteps {steps!r}: it must be a whole number of at least 1")
    if betas is not None:
        if not isinstance(betas, list | tuple) or len(betas) != steps or not all(map(_is_beta, betas)):
            raise InputError(f"{where} has trained_betas that are not {steps} numbers between 0 and 1")
        return
    start, end = config["beta_start"], config["beta_end"]
    if not _is_beta(start) or not _is_beta(end) or start > end:
        raise InputError(f"{where} has beta_start {start!r} and beta_end {end!r}: they must rise between 0 and 1")


def _is_beta(value: object) -> bool:
    return is_number(value) and 0 < value < 1


def read_noising(scheduler_config: Configuration, where: str) -> Noising:
    """The forward process of a scheduler's configuration, zero terminal SNR included. Raises InputError: as
    `check_scheduler`."""
    filled_in = scheduler_config.get("_use_default_values", ())
    given = {key: value for key, value in scheduler_config.items() if key not in filled_in}
    check_scheduler(given, f"{where}: its scheduler")
    scheduler = DDPMScheduler.from_config(dict(scheduler_config))
    return Noising(scheduler.alphas_cumprod.float(), str(scheduler_config.get("prediction_type", "epsilon")))


@dataclass(frozen=True)
class Draws:
    """What is random in a pair's scores; shared by both models and both images of the pair.

    Attributes:
        t: timestep of each pair.
        eps: noise of each pair, fp32.
        dropped: whether the pair's caption is replaced by the empty one.
    """

    t: Timesteps
    eps: Latents
    dropped: list[bool]


def draw_t(
    num_timesteps: int, generator: torch.Generator, sampling: str, section: Float[Tensor, "2"]
) -> Int[Tensor, " 1"]:
    """A timestep by one of the rules of `--timestep_sampling`.

    uniform: all alike. logit_normal: floor(T u) with logit u standard normal, the density of SD3 (arXiv 2403.03206,
    section 3.1, with m = 0 and s = 1) over the share of the schedule. sections: floor(T u) with u uniform in `section`.
    How often a level is asked weighs its losses, outside of the sigmoid; the weights of `errors` stand inside.

    Args:
        section: from where to where, in [0, 1].
    """
    if sampling == "uniform":
        return torch.randint(num_timesteps, (1,), generator=generator)
    if sampling == "logit_normal":
        share = torch.randn(1, generator=generator, dtype=torch.float64).sigmoid()
    else:
        start, end = section.double()
        share = start + (end - start) * torch.rand(1, generator=generator, dtype=torch.float64)
    return (share * num_timesteps).long().clamp(max=num_timesteps - 1)


def draw(
    seeds: list[int],
    shape: tuple[int, ...],
    num_timesteps: int,
    drop_probability: float,
    sampling: str = "uniform",
    sections: Float[Tensor, "batch 2"] | None = None,
) -> Draws:
    """One (t, eps, dropped) per seed, always on the CPU so that they do not depend on the device.

    Sharing t and eps between the real and the generated image is a variance reduction (the objective does not need it).

    Args:
        sampling, sections: as of `draw_t`; None = each pair's section is the whole schedule.
    """
    ts, noises, dropped = [], [], []
    sections = torch.tensor([[0.0, 1.0]]).expand(len(seeds), 2) if sections is None else sections
    for seed, section in zip(seeds, sections, strict=True):
        generator = torch.Generator().manual_seed(seed)
        ts.append(draw_t(num_timesteps, generator, sampling, section))
        dropped.append(torch.rand(1, generator=generator).item() < drop_probability)
        noises.append(torch.randn(shape, generator=generator))
    return Draws(torch.cat(ts), torch.stack(noises), dropped)


def _per_sample(values: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1 1 1"]:
    return values[:, None, None, None]
