"""Checkpoints in one file, as they are shared: the tensors of a whole pipeline, or of its UNet alone, under their
original names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spin_diffusion.diffusion.families import families
from spin_diffusion.diffusion.original import UNET, origins_of
from spin_diffusion.store.run_dir import write_file

PREDICTION = "modelspec.prediction_type"
"""Key of a file's metadata: epsilon or v (Stability AI's ModelSpec 1.0)."""
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Names of empty tensors by which ComfyUI and Forge know a model that predicts v, and one of zero terminal SNR."""


def write_single_file(path: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a whole checkpoint of UNet, VAE and text encoders, as A1111, Forge and ComfyUI load it.

    Args:
        metadata: what the file says of itself beside its kind of prediction.

    Raises:
        InputError: the original layout has no place for a part.
    """
    encoders = families()[type(pipeline).__name__].ENCODERS
    _write(path, pipeline, ("unet", "vae", *encoders), "", dtype, metadata)


def write_unet_file(path: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a pipeline's UNet alone, as ComfyUI loads it from its folder diffusion_models. Args and Raises as of
    `write_single_file`."""
    _write(path, pipeline, ("unet",), UNET, dtype, metadata)


def _write(
    path: Path, pipeline: Any, parts: Iterable[str], markers: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Args: markers: prefix of the names of the empty tensors; ComfyUI reads nothing of a UNet's file without its."""
    family, scheduler = families()[type(pipeline).__name__], pipeline.scheduler.config
    tensors: dict[str, Tensor] = {}
    for part in parts:
        model = getattr(pipeline, part)
        own = model.state_dict()
        for name, origin in origins_of(family, part, model).items():
            tensors[name] = origin.tensor(own).to(dtype).cpu().contiguous()
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    said = {V_PREDICTION: predicts_v, ZERO_SNR: scheduler.get("rescale_betas_zero_snr")}
    tensors |= {markers + name: torch.zeros(0) for name, is_so in said.items() if is_so}
    about = {"format": "pt", PREDICTION: "v" if predicts_v else "epsilon", **metadata}
    write_file(path, lambda part: save_file(tensors, part, about))
