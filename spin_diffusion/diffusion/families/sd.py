"""Stable Diffusion 1.x and 2.x: one text encoder, no further conditioning.

Which of the two it is (epsilon or v-prediction, with or without zero terminal SNR) is the scheduler's business.
"""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from spin_diffusion.diffusion.families import Conditioning, Embedded, Frames

PIPELINE = StableDiffusionPipeline
FLAGS = ()
RESOLUTION = 512
ENCODERS = {"text_encoder": CLIPTextModel}
ADDED_EMBEDDING = None
SCALING_FACTOR = 0.18215
STANDARDISED_LATENTS = False
# OpenAI's CLIP in 1.x, LAION's in 2.x
ENCODER_PREFIXES = {"text_encoder": {"quick_gelu": "cond_stage_model.transformer.", "gelu": "cond_stage_model.model."}}
CONFIGURED_AS = {"cond_stage_model.transformer.": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
ORIGINAL_NAMES = False


def architecture(config: Any, prediction_type: str) -> tuple[str, str]:
    """2.x by the linear projections that all of its UNets have."""
    if not config.use_linear_projection:
        return "stable-diffusion-v1", "sd_v1"
    if prediction_type == "v_prediction":
        return "stable-diffusion-v2-768-v", "sd_v2_v"
    return "stable-diffusion-v2-512", "sd_v2"


@torch.no_grad()
def embed(pipeline: StableDiffusionPipeline, texts: list[str]) -> Embedded:
    """The encoder's tokens."""
    tokens, _ = pipeline.encode_prompt(
        texts, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"tokens": tokens}


def unconditional(pipeline: StableDiffusionPipeline) -> Embedded:
    """The empty prompt's."""
    return embed(pipeline, [""])


def condition(embedded: Embedded, frames: Frames) -> Conditioning:
    """SD is not told sizes."""
    return Conditioning(embedded["tokens"])
