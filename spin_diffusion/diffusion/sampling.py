"""Drawing images: the opponent's samples and the evaluation's pictures come from the same function.

diffusers' own pipelines and schedulers do the work. Every image has a generator of its own, so its starting noise does
not depend on the images drawn beside it; the batch changes a picture by rounding only.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from spin_diffusion.diffusion.families import Frames
from spin_diffusion.diffusion.images import Size, decode_latents, to_images
from spin_diffusion.diffusion.lora import load_adapter
from spin_diffusion.diffusion.parts import Part, load_unet
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.selfplay.device import autocast_dtype, sent
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError, printable

SAMPLERS: dict[str, Callable[[Mapping[str, object]], Any]] = {
    # Latents are not confined to [-1, 1]: DDIM clips them unless told otherwise
    "ddim": lambda config: DDIMScheduler.from_config(config, clip_sample=False),
    "dpmpp": lambda config: DPMSolverMultistepScheduler.from_config(config),
}


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


def drawing_pipeline(
    pipeline: Any,
    sampler: str,
    *,
    unet: Path | None = None,
    lora: Path | None = None,
    strength: float | None = None,
    base_hash: str | None = None,
) -> Any:
    """A base's pipeline with another sampler, and with a saved UNet or adapter where one is given. The base's own UNet
    stays as it is.

    Args:
        unet, lora: folders as a round saves them.
        strength: how far to go from the base to the player, whose adapter is fused then: base + strength (player -
            base). None = the player as it is, at 1.
        base_hash: of the UNet's weights of the base that a saved UNet was trained from; an adapter knows its own.

    Raises:
        InputError: the base is another than the one that the player goes from, or the player cannot be read.
    """
    network = pipeline.unet if unet is None else load_unet(Part(unet, str(unet)))
    if unet is not None and strength is not None:
        if base_hash not in (None, found := weights_hash(pipeline.unet)):
            raise InputError(
                f"{printable(unet)} was trained from another base (hash {str(base_hash)[:12]}, this one has "
                f"{found[:12]}): put that base back"
            )
        _go_from(pipeline.unet, network, strength)
    if lora is not None:
        network = copy.deepcopy(network)
        load_adapter(sampling_pipeline(pipeline, network, sampler), lora, strength)
    network.to(pipeline.unet.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return sampling_pipeline(pipeline, network, sampler)


@torch.no_grad()
def _go_from(base: nn.Module, player: nn.Module, strength: float) -> None:
    """Make of the player's weights base + strength (player - base); exactly the base's at 0, and its own at 1."""
    of_base = base.state_dict()
    for name, weight in player.state_dict().items():
        weight.copy_(torch.lerp(of_base[name].to(weight), weight, strength))


def draw_batches(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    sampling: Sampling,
    *,
    batch_size: int,
    size: Size | None = None,
    frames: Frames | None = None,
) -> Iterator[list[Image.Image]]:
    """One image per prompt and seed, drawn in batches of `batch_size` in the order given.

    Args:
        pipeline: with the sampler that the record names, as `sampling_pipeline` gives it.
        size: height and width, px; None = a square of the record's resolution.
        frames: what SDXL is told of size and crop, with guidance in both halves alike; None = what users tell it, who
            leave it to diffusers: the size that is drawn and no crop.

    Raises:
        FloatingPointError: an image that is not finite.
        InputError: more steps than the model's noise has.
    """
    _check_steps(pipeline.scheduler, sampling.num_inference_steps)
    height, width = (sampling.resolution, sampling.resolution) if size is None else size
    unet, dtype = pipeline.unet, autocast_dtype(sampling.precision.split()[0])
    for start in range(0, len(prompts), batch_size):
        part = list(range(start, min(start + batch_size, len(prompts))))
        count = len(part)
        if is_compiled(unet):
            part += [part[-1]] * (batch_size - count)  # every other size of a batch would be compiled anew
        of_part = frames[part] if frames is not None else None
        stand_in = _StandIn(pipeline, len(part), of_part, sampling.prediction_scale)
        pipeline.unet = stand_in
        try:
            with torch.no_grad(), torch.autocast(unet.device.type, dtype, enabled=dtype is not None):
                latents = pipeline(
                    [prompts[place] for place in part],
                    height=height,
                    width=width,
                    num_inference_steps=sampling.num_inference_steps,
                    guidance_scale=sampling.guidance_scale,
                    generator=[torch.Generator().manual_seed(seeds[place]) for place in part],
                    output_type="latent",
                ).images[:count]
        finally:
            pipeline.unet = unet
        pixels = decode_latents(pipeline.vae, latents.float(), [repr(prompts[place][:60]) for place in part[:count]])
        yield to_images(pixels)


def _check_steps(scheduler: Any, steps: int) -> None:
    most = scheduler.config.num_train_timesteps
    if steps <= most:
        scheduler.set_timesteps(steps)  # as the pipeline does
        if int(max(scheduler.timesteps)) < most:  # with an offset the last of them may lie beyond
            return
    raise InputError(f"{steps} denoising steps are too many for a model that was trained with {most}: give fewer")


def is_compiled(network: nn.Module) -> bool:
    """Whether torch.compile was asked for it, or for a part of it."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())


def draw_images(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    sampling: Sampling,
    *,
    batch_size: int,
    done: Callable[[int], None] = lambda images: None,
) -> list[Image.Image]:
    """The images of `draw_batches`, each told its own size; `done` is told how many there are so far."""
    images: list[Image.Image] = []
    for drawn in draw_batches(pipeline, prompts, seeds, sampling, batch_size=batch_size):
        images += drawn
        done(len(images))
    return images


class _StandIn:
    """A pipeline's UNet for one batch: it tells each image its own frame, where diffusers has one for all of them, and
    scales what the UNet predicts. A compiled UNet would not ask a hook."""

    def __init__(self, pipeline: Any, images: int, frames: Frames | None, prediction_scale: float) -> None:
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        self.images, self.frames, self.prediction_scale = images, frames, prediction_scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, x_t: Tensor, t: Tensor, **inputs: Any) -> Any:
        added = inputs.get("added_cond_kwargs")
        if self.frames is not None and added and "time_ids" in added:
            frames = self.frames.repeat(len(x_t) // self.images, 1)
            inputs["added_cond_kwargs"] = added | {"time_ids": sent(frames.float(), x_t.device)}
        (predicted,) = self.unet(x_t, t, **inputs)  # pipelines ask for a tuple
        return (self._scaled(predicted, x_t, t),)

    def _scaled(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        # Both halves of guidance alike, which scales what is guided. epsilon = sqrt(abar_t) v + sqrt(1 - abar_t) x_t
        scale = self.prediction_scale
        if scale == 1 or self.scheduler.config.prediction_type == "epsilon":
            return scale * predicted
        abar_t = float(self.scheduler.alphas_cumprod[int(t)])
        if abar_t == 0:
            return predicted  # x_t is noise alone, whatever is predicted
        return scale * predicted + (scale - 1) * ((1 - abar_t) / abar_t) ** 0.5 * x_t
