"""Stable Diffusion 1.x and 2.x: one text encoder, no further conditioning.

Which of the two it is (epsilon or v-prediction, with or without zero terminal SNR) is the scheduler's business.
"""

import torch
from diffusers import StableDiffusionPipeline

from spin_diffusion.diffusion.families import Conditioning, Frames

PIPELINE = StableDiffusionPipeline
RESOLUTION = 512


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionPipeline, prompts: list[str], dropped: list[bool], frames: Frames
) -> Conditioning:
    """The prompts' conditioning; where `dropped`, that of the empty prompt, as the sampler's unconditional half has it.

    Args:
        frames: one or several per prompt, all prompts in order each time. SD is not told sizes; their number counts.
    """
    texts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
    tokens, _ = pipeline.encode_prompt(
        texts, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    copies = len(frames) // len(prompts)
    return Conditioning(tokens.repeat(copies, 1, 1))
