"""SDXL: two text encoders, a pooled embedding, and each image's own size and crop (arXiv 2307.01952, section 2.2)."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spin_diffusion.diffusion.families import Conditioning, Embedded, Frames
from spin_diffusion.selfplay.device import sent

PIPELINE = StableDiffusionXLPipeline
FLAGS = ("force_zeros_for_empty_prompt",)
RESOLUTION = 1024
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
ADDED_EMBEDDING = "text_time"
SCALING_FACTOR = None
STANDARDISED_LATENTS = True
ENCODER_PREFIXES = {
    "text_encoder": {"quick_gelu": "conditioner.embedders.0.transformer."},
    "text_encoder_2": {"gelu": "conditioner.embedders.1.model."},
}
CONFIGURED_AS = {"conditioner.embedders.1.model.": "stabilityai/stable-diffusion-xl-base-1.0"}
ORIGINAL_NAMES = True


def architecture(config: Any, prediction_type: str) -> tuple[str, str]:
    """One, whatever it predicts."""
    return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"


@torch.no_grad()
def embed(pipeline: StableDiffusionXLPipeline, texts: list[str]) -> Embedded:
    """Both encoders' tokens side by side, and the second one's pooled embedding."""
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"tokens": tokens, "pooled": pooled}


def unconditional(pipeline: StableDiffusionXLPipeline) -> Embedded:
    """Zeros when the checkpoint says `force_zeros_for_empty_prompt` (SDXL base does), else the empty prompt's."""
    empty = embed(pipeline, [""])
    if pipeline.config.force_zeros_for_empty_prompt:
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
    return empty


def condition(embedded: Embedded, frames: Frames) -> Conditioning:
    """Frames go in as the UNet's `time_ids`."""
    tokens, pooled = embedded["tokens"], embedded["pooled"]
    time_ids = sent(frames.float(), tokens.device)
    return Conditioning(tokens, {"text_embeds": pooled, "time_ids": time_ids})
