"""Forward diffusion: from latents x_0 to x_t, and the target a denoiser is asked for at x_t.

To add a prediction target, add one line to TARGETS.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.selfplay.sending import sent
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
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Samplers of diffusers for one and the same forward process: DDPM's, in steps. They differ in how they go back."""
_SPACINGS = ("leading", "linspace", "trailing")
_NEEDED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
# Of these settings only the values that leave DDPM's process and the denoiser's inputs and outputs as they are
_PLAIN = {
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}


def check_scheduler(config: Mapping[str, object], where: str, kind: str | None = None) -> None:
    """Refuse a scheduler's configuration that does not name a process of DDPM's, whole.

    A missing prediction_type is epsilon: the files of Stable Diffusion 1.x are older than the key.

    Args:
        config: the file's content, without defaults of the library.
        where: what the user gave, and that it is its scheduler; it begins the message.
        kind: class that the pipeline names for it.

    Raises:
        InputError: another process, such as EDM's or flow matching; a key that is missing, unknown or out of range.
    """
    kinds = [str(found) for found in (kind, config.get("_class_name")) if found is not None]
    for found in kinds:
        if found not in _SCHEDULERS:
            raise InputError(
                f"{where}, {found}, is not one of DDPM's noise, which training would add: models of EDM, flow matching "
                "and consistency distillation are not supported; give a base with DDIMScheduler, PNDMScheduler, "
                "EulerDiscreteScheduler or another of DDPM's"
            )
    if kind is not None and config.get("_class_name") != kind:
        raise InputError(
            f"{where} is {kind} by model_index.json and {config.get('_class_name')} by scheduler_config.json: name one "
            "class in both"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in TARGETS:
        raise InputError(
            f"{where} has prediction_type {prediction_type!r}, which is not supported (supported: {', '.join(TARGETS)})"
        )
    known = {name for found in _SCHEDULERS for name in inspect.signature(getattr(diffusers, found).__init__).parameters}
    if foreign := sorted(key for key in config if key not in known and not key.startswith("_")):
        raise InputError(
            f"{where} has {', '.join(foreign[:5])}, which no scheduler of DDPM's process knows: if the model was "
            "trained with DDPM's noise remove it from scheduler_config.json, else the model is not supported"
        )
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{where} has {key} {config[key]!r}, which is not supported ({plain[0]!r} is)")
    _check_betas(config, where)
    steps, offset = config["num_train_timesteps"], config.get("steps_offset", 0)
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < steps:
        raise InputError(f"{where} has steps_offset {offset!r}: it must be a whole number from 0 to below {steps}")
    if config.get("timestep_spacing", _SPACINGS[0]) not in _SPACINGS:
        raise InputError(
            f"{where} has timestep_spacing {config['timestep_spacing']!r}, which is not supported (supported: "
            f"{', '.join(_SPACINGS)})"
        )
    if kinds:
        check_complete(config, getattr(diffusers, kinds[0]), where, "scheduler_config.json")


def check_complete(config: Mapping[str, object], kind: type, where: str, file: str) -> None:
    """Refuse a configuration that was written by this version of diffusers, or a later one, and lacks keys of its
    class: diffusers writes all of them, so they were lost. A key that an older file lacks is younger than the file, and
    its default is what was computed before there was a choice."""
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
    missing = sorted(key for key in known if key not in config)
    if missing and _release(config.get("_diffusers_version")) >= _release(diffusers.__version__):
        raise InputError(
            f"{where}: {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing in {file}, and the "
            "library's default may be another: get the checkpoint's own file"
        )


def _release(version: object) -> tuple[int, ...]:
    """The first two numbers of a version, (0, 42) of "0.42.1.dev0"; () of what is none."""
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:2]) if isinstance(version, str) else ()


def _check_betas(config: Mapping[str, object], where: str) -> None:
    betas = config.get("trained_betas")
    if missing := [key for key in (_NEEDED[:1] if betas is not None else _NEEDED) if config.get(key) is None]:
        raise InputError(
            f"{where} does not say {', '.join(missing)}, and the library's default may be another noise: get the "
            "checkpoint's own scheduler_config.json (Stable Diffusion has beta_start 0.00085, beta_end 0.012, "
            "beta_schedule scaled_linear, num_train_timesteps 1000)"
        )
    steps = config["num_train_timesteps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"{where} has num_train_timesteps {steps!r}: it must be a whole number of at least 1")
    if betas is not None:
        if not isinstance(betas, list | tuple) or len(betas) != steps or not all(map(_is_beta, betas)):
            raise InputError(f"{where} has trained_betas that are not {steps} numbers between 0 and 1")
        return
    start, end = config["beta_start"], config["beta_end"]
    if not (_is_beta(start) and _is_beta(end) and start <= end):  # type: ignore[operator]
        raise InputError(f"{where} has beta_start {start!r} and beta_end {end!r}: they must rise between 0 and 1")
    if config["beta_schedule"] not in _SCHEDULES:
        raise InputError(
            f"{where} has beta_schedule {config['beta_schedule']!r}, which is not supported (supported: "
            f"{', '.join(_SCHEDULES)})"
        )


def _is_beta(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value < 1


def read_noising(scheduler_config: Mapping[str, object], where: str) -> Noising:
    """The forward process of a scheduler's configuration, zero terminal SNR included.

    Raises:
        InputError: as `check_scheduler`.
    """
    filled_in = scheduler_config.get("_use_default_values", ())
    given = {key: value for key, value in scheduler_config.items() if key not in filled_in}  # type: ignore[operator]
    check_scheduler(given, f"{where}: its scheduler")
    scheduler = DDPMScheduler.from_config(dict(scheduler_config))
    return Noising(scheduler.alphas_cumprod.float(), str(scheduler_config.get("prediction_type", "epsilon")))


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
