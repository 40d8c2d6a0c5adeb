"""Families: how a prompt becomes the denoiser's inputs, and nothing else.

To add one, put a file here with

    PIPELINE                  the diffusers class whose name stands in the checkpoint's model_index.json
    FLAGS                     settings that model_index.json must say
    RESOLUTION                its usual image size, px
    ENCODERS                  its text encoders' classes by their names; "tokenizer" stands in the name of each one's
    ADDED_EMBEDDING           addition_embed_type of its UNet: what `condition` gives beside the tokens
    SCALING_FACTOR            of a VAE whose file does not say it; None = the file must
    STANDARDISED_LATENTS      whether the class applies a VAE's latents_mean and latents_std
    embed(pipeline, texts)    what its text encoders make of prompts, one row each: all that is kept of a prompt
    unconditional(pipeline)   the same of the sampler's unconditional half; training must drop captions to it
    condition(embedded, frames) -> Conditioning

`load_checkpoint` finds the file by the class name in model_index.json; a family is never guessed from a path.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.parts import is_local, load_parts
from spin_diffusion.store.configuration import Configuration, read_configuration
from spin_diffusion.store.input_error import InputError, one_line
from spin_diffusion.store.weights import read_header

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


def family_of(model_index: Configuration, where: str) -> ModuleType:
    """The family of a checkpoint by its model_index.json; InputError names what is supported."""
    name = model_index.get("_class_name")
    known = families()
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{where} is a {name}, which is not supported (supported: {', '.join(sorted(known))})")
    return known[name]


def load_checkpoint(base: Base | str, *, cache_dir: str | None = None) -> tuple[ModuleType, Any]:
    """A pipeline in fp32, from a local folder or a hub id, and its family.

    Raises:
        InputError: no such folder or hub id, an unsupported family or denoiser, a part that is not what its files say.
    """
    base = Base.of(base)
    folder = _folder_of(base, cache_dir)
    index = read_configuration(folder / "model_index.json", base.name)
    family = family_of(index, base.name)
    parts = load_parts(family, index, folder, base, cache_dir)
    try:
        return family, family.PIPELINE.from_pretrained(str(folder), **parts)
    except Exception as error:  # diffusers raises dozens of kinds
        raise InputError(f"cannot load the model {base.name!r}: {one_line(error)}") from error


def _folder_of(base: Base, cache_dir: str | None) -> Path:
    """The local folder of a checkpoint; of one on the hub, where its files were downloaded to."""
    flag, folder = f"--pretrained_model_name_or_path {base.name}", Path(base.name)
    if folder.is_file():
        raise InputError(f"{flag} {single_file(folder)}")
    if is_local(base.name):
        if not (folder / "model_index.json").is_file():
            what = "has no model_index.json" if folder.is_dir() else "does not exist"
            raise InputError(
                f"{flag}: the folder {what}; give a folder in diffusers' layout or a hub id such as "
                "stabilityai/stable-diffusion-xl-base-1.0"
            )
        return folder
    try:
        options = {"revision": base.revision, "variant": base.variant, "cache_dir": cache_dir}
        found = DiffusionPipeline.download(base.name, use_safetensors=True, safety_checker=None, **options)
    except Exception as error:  # the hub's client raises dozens of kinds
        raise InputError(
            f"{flag}: neither a local folder nor a hub id that can be reached ({one_line(error)})"
        ) from error
    return Path(found)


def single_file(path: Path) -> str:
    """What is said of a checkpoint that is one file: what it is, and how it becomes a folder."""
    if path.suffix != ".safetensors":
        return (
            "is a single file that is not safetensors, and may run code when it is read: get the .safetensors file of "
            "the same model, or a folder in diffusers' layout"
        )
    names = read_header(path)
    # Of the original layouts only SDXL's has conditioners, of diffusers' own only its UNet an added embedding
    is_larger = any(name.startswith(("conditioner.", "add_embedding.")) for name in names)
    by_encoders = sorted(families().values(), key=lambda family: len(family.ENCODERS))
    pipeline = by_encoders[-1 if is_larger else 0].PIPELINE.__name__
    whole = any(name.startswith("model.diffusion_model.") for name in names)
    what = "is a single-file checkpoint" if whole else "is a single file and, by its tensors, only a part of a pipeline"
    convert = f"{pipeline}.from_single_file({str(path)!r}).save_pretrained(FOLDER)"
    return f"{what}: convert {'it' if whole else 'a whole one'} once with diffusers, {convert}, and give FOLDER"


__all__ = ["Conditioning", "Embedded", "Frames", "families", "family_of", "load_checkpoint", "single_file"]
