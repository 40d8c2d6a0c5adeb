"""Models that draw: the pipeline of a base, and what a round saved in the place of its UNet."""

import copy
from pathlib import Path
from typing import Any

import torch

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.families import load_checkpoint
from spin_diffusion.diffusion.lora import load_adapter
from spin_diffusion.diffusion.parts import load_unet
from spin_diffusion.diffusion.sampling import sampling_pipeline


def load_to_draw(base: Base, device: torch.device | str) -> tuple[Any, Any]:
    """The family and the pipeline of a base, on a device and not to be trained."""
    family, pipeline = load_checkpoint(base)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval().to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    return family, pipeline


def drawing_pipeline(pipeline: Any, sampler: str, *, unet: Path | None = None, lora: Path | None = None) -> Any:
    """A base's pipeline with another sampler, and with a saved UNet or adapter where one is given. The base's own UNet
    stays as it is.

    Args:
        unet, lora: folders as a round saves them.
    """
    network = pipeline.unet if unet is None else load_unet(unet, str(unet))
    if lora is not None:
        network = copy.deepcopy(network)
        load_adapter(sampling_pipeline(pipeline, network, sampler), lora)
    network.to(pipeline.unet.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return sampling_pipeline(pipeline, network, sampler)
