"""The UNet as it is trained and asked: its precision, its frozen copy, its kernels."""

import copy
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from spin_diffusion.selfplay.precision import autocast_dtype
from spin_diffusion.store.input_error import InputError, one_line


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
        raise InputError(
            f"--enable_xformers_memory_efficient_attention: xformers cannot run here ({one_line(error)}); leave the "
            "flag out to use torch's own attention, or pip install 'spin-diffusion[xformers]' on a CUDA machine"
        ) from error
