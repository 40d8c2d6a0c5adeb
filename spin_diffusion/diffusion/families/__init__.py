"""Families: how a prompt becomes the denoiser's inputs, and nothing else.

To add one, put a file here with

    PIPELINE                  the diffusers class whose name stands in the checkpoint's model_index.json
    RESOLUTION                its usual image size, px
    embed(pipeline, texts)    what its text encoders make of prompts, one row each: all that is kept of a prompt
    unconditional(pipeline)   the same of the sampler's unconditional half; training must drop captions to it
    condition(embedded, frames) -> Conditioning

`load_checkpoint` finds the file by the class name in model_index.json; a family is never guessed from a path.
"""

import importlib
import json
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.input_error import InputError

Frames = Int[Tensor, "batch 6"]
"""Per image: original height and width, top and left of the crop, height and width of the target, px."""

Embedded = dict[str, Tensor]
"""By name, first axis = prompt; always with `tokens` (prompts, length, width)."""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside x_t and t.

    Attributes:
        tokens: one vector per text token.
        added: SDXL's `text_embeds` (batch, width) and `time_ids` (batch, 6); empty for SD.
    """

    tokens: Float[Tensor, "batch length width"]
    added: dict[str, Tensor] = field(default_factory=dict)


def families() -> dict[str, ModuleType]:
    """The families by the name of their pipeline class."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.PIPELINE.__name__: module for module in modules}


def family_of(model_index: dict[str, Any], where: str) -> ModuleType:
    """The family of a checkpoint by its model_index.json; InputError names what is supported."""
    name = model_index.get("_class_name")
    known = families()
    if name not in known:
        raise InputError(f"{where} is a {name}, which is not supported (supported: {', '.join(sorted(known))})")
    return known[name]


def load_checkpoint(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae_name_or_path: str | None = None,
    cache_dir: str | None = None,
) -> tuple[ModuleType, Any]:
    """A pipeline in fp32, from a local folder or a hub id, and its family.

    Raises:
        InputError: no such folder or hub id, an unsupported family or denoiser, a damaged file.
    """
    options = {"revision": revision, "cache_dir": cache_dir}
    try:
        index = _model_index(name_or_path, options)
        family = family_of(index, name_or_path)
        extra = {}
        if vae_name_or_path is not None:
            from diffusers import AutoencoderKL

            extra["vae"] = AutoencoderKL.from_pretrained(vae_name_or_path, cache_dir=cache_dir)
        # The safety checker would replace training samples by black squares
        optional = {"safety_checker": None, "feature_extractor": None} if "safety_checker" in index else {}
        pipeline = family.PIPELINE.from_pretrained(
            name_or_path, dtype=torch.float32, variant=variant, use_safetensors=True, **options, **extra,
            **optional,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise dozens of kinds
        raise InputError(f"cannot load the model {name_or_path!r}: {_first_line(error)}") from error
    if not isinstance(pipeline.unet, UNet2DConditionModel):
        raise InputError(
            f"{name_or_path}: its denoiser is a {type(pipeline.unet).__name__}, not a UNet2DConditionModel"
        )
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"{name_or_path}: its UNet takes {pipeline.unet.config.in_channels} channels where the VAE has "
            f"{pipeline.vae.config.latent_channels}: inpainting and refiner models are not supported"
        )
    return family, pipeline


def _model_index(name_or_path: str, options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(name_or_path)
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        file = folder / "model_index.json"
        if not file.is_file():
            what = "has no model_index.json" if folder.is_dir() else "does not exist"
            raise InputError(
                f"--pretrained_model_name_or_path {name_or_path}: the folder {what}; give a folder in diffusers' "
                "layout or a hub id such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        return json.loads(file.read_text())
    try:
        return DiffusionPipeline.load_config(name_or_path, **options)
    except Exception as error:
        raise InputError(
            f"--pretrained_model_name_or_path {name_or_path}: neither a local folder nor a hub id that can be reached "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


__all__ = ["Conditioning", "Embedded", "Frames", "families", "family_of", "load_checkpoint"]
