"""The UNet as it is trained and asked: its settings, its precision, its frozen copy."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from spin_diffusion.diffusion.attention import Kernel
from spin_diffusion.input_error import InputError


@dataclass(frozen=True)
class DenoiserSettings:
    """How the denoiser is scored and run."""

    proportion_empty_prompts: float = 0.0
    """Share of pairs, in [0, 1], whose caption is dropped, for both sides alike."""
    winner_preserving_mu: float | None = None
    """Rescale the generated side's gradient so that the real side keeps this share of its descent (Diffusion-SDPO)."""
    snr_gamma: float | None = None
    """Weigh scores by min-SNR with this gamma; 5 is its paper's."""
    timestep_weights: list[float] | None = None
    """Weigh scores by these, one for each of equal sections of the noise schedule, the cleanest first."""
    fixed_draws: int = 0
    """Noise each pair at this many fixed draws of (timestep, noise) alone. The opponent's errors at them are computed
    once, and it is not in memory while the player is trained. 0 = a fresh draw at every visit."""
    channels_last: bool = True
    """Memory layout of the UNet; faster convolutions on most hardware."""
    compile: Literal["no", "blocks", "whole"] = "no"
    """torch.compile for the UNet: its transformer blocks (seconds to compile), or all of it (minutes). It pays where
    rounds are long; needs a C++ compiler on a CPU."""
    attention_kernel: Kernel = "torch"
    """torch's attention: as torch chooses, the fastest by a measurement at the start (measure), or flash, efficient,
    cudnn, math. Kernels round differently, so one that is measured may change the last digits between machines."""
    enable_xformers_memory_efficient_attention: bool = False
    """xformers' attention instead of torch's; needs the extra `xformers` and a CUDA device."""

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise InputError(f"--proportion_empty_prompts {self.proportion_empty_prompts} must be between 0 and 1")
        if self.fixed_draws < 0:
            raise InputError(f"--fixed_draws {self.fixed_draws} must be at least 0")
        if self.winner_preserving_mu is not None and not 0 <= self.winner_preserving_mu < 1:
            raise InputError(f"--winner_preserving_mu {self.winner_preserving_mu} must be at least 0 and below 1")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise InputError(f"--snr_gamma {self.snr_gamma} must be above 0")
        if self.timestep_weights is not None and not (
            self.timestep_weights and min(self.timestep_weights) >= 0 and max(self.timestep_weights) > 0
        ):
            raise InputError(f"--timestep_weights {self.timestep_weights} must be numbers of at least 0, not all 0")


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """In which linear layers and convolutions are computed; None = as they are."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def opponent_of(player: UNet2DConditionModel, mixed_precision: str) -> UNet2DConditionModel:
    """A frozen copy; under autocast it says the same in half the memory."""
    opponent = copy.deepcopy(player).requires_grad_(False).eval()
    cast_for_autocast(opponent, autocast_dtype(mixed_precision))
    return opponent


def cast_for_autocast(unet: UNet2DConditionModel, dtype: torch.dtype | None) -> None:
    """Keep linear and convolution weights in the dtype to which autocast would cast them at every call: the same
    numbers in half the memory. Norms stay fp32, as autocast computes them.

    Args:
        dtype: None = no autocast, all stays as it is.
    """
    if dtype is not None:
        for module in unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)


def compile_unet(unet: UNet2DConditionModel, how: Literal["no", "blocks", "whole"]) -> None:
    """Compile in place, so that no weight changes its name; a copy of a compiled UNet is not compiled."""
    if how == "blocks":
        unet.compile_repeated_blocks(dynamic=False)
    elif how == "whole":
        unet.compile(dynamic=False)


def enable_xformers(unet: UNet2DConditionModel) -> None:
    """Switch to xformers' attention, where its kernels load.

    Raises:
        InputError: not installed, or not able to run here.
    """
    try:
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # ModuleNotFoundError, ValueError and kernel errors alike
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--enable_xformers_memory_efficient_attention: xformers cannot run here ({reason}); leave the flag out to "
            "use torch's own attention, or pip install 'spin-diffusion[xformers]' on a CUDA machine"
        ) from error
