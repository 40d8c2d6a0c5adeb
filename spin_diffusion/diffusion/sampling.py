"""Drawing images: the opponent's samples and the evaluation's pictures come from the same function.

diffusers' own pipelines and schedulers do the work. Every image has a generator of its own, so its starting noise does
not depend on the images drawn beside it; the batch changes a picture by rounding only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image

from spin_diffusion.diffusion.images import decode_latents, to_images
from spin_diffusion.input_error import InputError

SAMPLERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    # Latents are not confined to [-1, 1]: DDIM clips them unless told otherwise
    "ddim": lambda config: DDIMScheduler.from_config(config, clip_sample=False),
    "dpmpp": lambda config: DPMSolverMultistepScheduler.from_config(config),
}


@dataclass(frozen=True)
class SamplingSettings:
    """How the opponent draws."""

    num_inference_steps: int = 50
    """Denoising steps per image."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of the opponent; 1 = none, the distribution that the theory speaks of."""
    sampler: Literal["checkpoint", "ddim", "dpmpp"] = "ddim"
    """checkpoint = the scheduler that the base checkpoint names."""
    generation_batch_size: int = 8
    """Images drawn at a time; guidance doubles the UNet's batch."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise InputError(f"--num_inference_steps {self.num_inference_steps} must be at least 1")
        if self.generation_batch_size < 1:
            raise InputError(f"--generation_batch_size {self.generation_batch_size} must be at least 1")
        if self.guidance_scale < 0:
            raise InputError(f"--guidance_scale {self.guidance_scale} must not be negative")


def sampling_pipeline(pipeline: Any, unet: UNet2DConditionModel, sampler: str) -> Any:
    """`pipeline` with another UNet and sampler; all other parts are shared, not copied."""
    components = dict(pipeline.components) | {"unet": unet}
    if sampler != "checkpoint":
        components["scheduler"] = SAMPLERS[sampler](dict(pipeline.scheduler.config))
    options = {key: pipeline.config[key] for key in ("force_zeros_for_empty_prompt",) if key in pipeline.config}
    if "safety_checker" in components:
        options["requires_safety_checker"] = False
    made = type(pipeline)(**components, **options)
    made.set_progress_bar_config(disable=True)
    return made


def draw_images(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    done: Callable[[int], None] = lambda images: None,
) -> list[Image.Image]:
    """One image per prompt and seed, drawn in batches of `batch_size` in the order given.

    Args:
        resolution: height and width, px.
        guidance_scale: 1 or less = without guidance.

    Raises:
        FloatingPointError: an image that is not finite.
    """
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with torch.no_grad(), autocast():
            latents = pipeline(
                prompts[part],
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="latent",
            ).images
        pixels = decode_latents(pipeline.vae, latents.float(), [repr(prompt[:60]) for prompt in prompts[part]])
        images += to_images(pixels)
        done(len(images))
    return images
