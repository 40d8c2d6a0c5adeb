"""The models that are timed: the toy, and SD 1.5 and SDXL in their real sizes with random weights (no download)."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spin_diffusion.diffusion.families import sd, sdxl

HERE = Path(__file__).parent
TOY = HERE.parent / "assets" / "toy_world" / "sloppy"
MODELS = ("toy", "sd15", "sdxl")


def family_of(pipeline: Any) -> ModuleType:
    """The module that speaks for models of this kind."""
    return sdxl if hasattr(pipeline, "text_encoder_2") else sd


def build(name: str, device: str) -> tuple[Any, int]:
    """A pipeline in fp32 on `device`, and the model's resolution in px.

    The tokenizers are the toy's: how words are cut changes no shape.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {device}: this machine, or this build of torch, has no CUDA", file=sys.stderr)
        raise SystemExit(2)
    if name == "toy":
        return DiffusionPipeline.from_pretrained(TOY, dtype=torch.float32).to(device), 64
    config = json.loads((HERE / "configs" / f"{name}.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "tokenizer")
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoders = [
            cls(CLIPTextConfig(**kind, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
            for cls, kind in zip(classes, config["text_encoders"], strict=False)
        ]
        parts = {
            "unet": UNet2DConditionModel(**config["unet"]),
            "vae": AutoencoderKL(**config["vae"]),
            "text_encoder": encoders[0],
            "tokenizer": tokenizer,
            "scheduler": DDIMScheduler(**config["scheduler"]),
        }
    if name == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=encoders[1],
            tokenizer_2=CLIPTokenizer.from_pretrained(TOY / "tokenizer_2"),
            force_zeros_for_empty_prompt=True,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return pipeline, config["resolution"]
