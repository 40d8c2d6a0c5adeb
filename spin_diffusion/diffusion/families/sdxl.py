"""SDXL: two text encoders, a pooled embedding, and each image's own size and crop (arXiv 2307.01952, section 2.2)."""

import torch
from diffusers import StableDiffusionXLPipeline

from spin_diffusion.diffusion.families import Conditioning, Frames

PIPELINE = StableDiffusionXLPipeline
RESOLUTION = 1024


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionXLPipeline, prompts: list[str], dropped: list[bool], frames: Frames
) -> Conditioning:
    """The prompts' conditioning; where `dropped`, that of the sampler's unconditional half.

    That half is zeros when the checkpoint says `force_zeros_for_empty_prompt` (SDXL base does), else the embedding of
    the empty prompt; training must drop to the same.

    Args:
        frames: one or several per prompt, all prompts in order each time.
    """
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
    texts = ["" if drop and not zeros else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if zeros and any(dropped):
        keep = torch.tensor([not drop for drop in dropped], device=tokens.device)
        tokens = tokens * keep[:, None, None]
        pooled = pooled * keep[:, None]
    copies = len(frames) // len(prompts)
    time_ids = frames.to(device=tokens.device, dtype=tokens.dtype)
    return Conditioning(tokens.repeat(copies, 1, 1), {"text_embeds": pooled.repeat(copies, 1), "time_ids": time_ids})
