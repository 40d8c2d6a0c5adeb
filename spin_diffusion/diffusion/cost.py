"""What a round costs in floating-point operations: what the networks take, times how often a round asks them.

The costs of one call are counted once on the real model by torch's FLOP counter (a multiplication and an addition are
two); the rest is arithmetic on the settings. Only what a method needs is counted: the frozen model's forward pass that
plain fine-tuning makes for its logs is left out, and so is every evaluation.
"""

import functools
import json
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.images import target_frame
from spin_diffusion.selfplay.device import counted


@dataclass(frozen=True)
class UnitCosts:
    """FLOPs of one call of each network for one image or prompt."""

    unet: int
    """Forward."""
    unet_backward: int
    """Backward to all weights."""
    unet_backward_inputs: int
    """Backward through the network without its weights, as adapters need it."""
    text: int
    """The text encoders, one prompt."""
    vae_encode: int
    vae_decode: int

    def of_area(self, share: float) -> "UnitCosts":
        """For images of another area, in parts of this one's; attention's share, which falls faster, is counted a
        little high."""
        per_image = ("unet", "unet_backward", "unet_backward_inputs", "vae_encode", "vae_decode")
        return replace(self, **{name: round(getattr(self, name) * share) for name in per_image})


@dataclass(frozen=True)
class RoundWork:
    """How often a round asks the networks."""

    steps: int
    """Optimizer steps."""
    scored: int
    """Noised images that the player scores in a step, both sides."""
    compared: int
    """How many of them the opponent scores too."""
    drawn: int
    """Images that the opponent draws."""
    encoded: int
    """Images that pass the VAE's encoder, `views` times each."""
    decoded: int
    """Images that pass the VAE's decoder."""
    denoisings: int
    """Calls of the UNet for each image drawn: sampler steps, twice with guidance."""
    prompts_per_image: int = 1
    """Prompts encoded for each image drawn: 2 where guidance needs the empty one's embedding."""
    views: int = 1
    """2 where an image's mirror image is encoded as well."""
    scored_once: int = 0
    """Noised images that the opponent scores before the first step."""
    forwards: int = 1
    """Forward passes of the player for each score: 2 where activations are computed again."""
    trains_weights: bool = True
    """Whether the weights get a gradient; False = adapters alone, whose own cost is left out."""


def step_flops(unit: UnitCosts, work: RoundWork) -> int:
    """FLOPs of one optimizer step; the optimizer's own arithmetic is left out, it is below a thousandth. Prompts were
    encoded before."""
    backward = unit.unet_backward if work.trains_weights else unit.unet_backward_inputs
    return work.scored * (work.forwards * unit.unet + backward) + work.compared * unit.unet


def generation_flops(unit: UnitCosts, work: RoundWork) -> int:
    """FLOPs before the first step of a round: drawing the opponent's images, encoding them, and its kept scores."""
    drawing = work.drawn * (work.denoisings * unit.unet + work.prompts_per_image * unit.text)
    encoding = work.encoded * work.views * unit.vae_encode
    return drawing + encoding + work.decoded * unit.vae_decode + work.scored_once * unit.unet


def phase_flops(unit: UnitCosts, work: RoundWork, phase: str, samples: int, pairs_per_step: int) -> int | None:
    """FLOPs of a phase of a round in which so many samples were worked on: images `generated`, images encoded
    (`cached`), pairs `trained`, held-out pairs `judged` by the gap; None for another phase.

    Activations that gradient checkpointing computes again are not counted: the share of the matrix rate that follows is
    the model FLOPs utilisation, MFU (arXiv 2204.02311, appendix B)."""
    if phase == "generated":
        return samples * (work.denoisings * unit.unet + work.prompts_per_image * unit.text + unit.vae_decode)
    if phase == "cached":
        scored = round(work.scored_once * unit.unet * samples / max(work.encoded, 1))
        return samples * work.views * unit.vae_encode + scored
    if phase == "judged":
        return (work.scored + work.compared) * unit.unet * samples // pairs_per_step
    return step_flops(unit, replace(work, forwards=1)) * samples // pairs_per_step if phase == "trained" else None


def draws_worth_keeping(visits: float) -> int:
    """Fixed draws of a pair that is visited so often in a round: as many as are visited twice at least, since the
    opponent's errors at a draw that is visited once are computed once in any case."""
    return int(visits // 2)


def work_of(
    config: Config, source: str, rows: int, steps: int, zeros_for_empty: bool = False, world: int = 1
) -> RoundWork:
    """The work of one round of a run.

    Args:
        source: where the generated side comes from: opponent, data or none.
        rows: real samples of the round.
        steps: optimizer steps of the round.
        zeros_for_empty: the pipeline needs no embedding of the empty prompt.
        world: processes, of which each scores a batch of its own in a step.
    """
    training, sampling, candidates = config.training, config.sampling, config.rounds.candidates
    batch = training.train_batch_size * training.gradient_accumulation_steps
    copies = config.rounds.num_generated if source == "opponent" else 1
    scored = batch * copies * (1 if source == "none" else 2)
    draws = 0 if source == "none" else config.denoiser.fixed_draws
    draws = draws_worth_keeping(steps * batch / rows) if draws == "auto" else draws
    per_prompt: float = copies
    if candidates.number:
        per_prompt = candidates.number * candidates.share + copies * (1 - candidates.share)
    # As `selfplay.one_round.Round.visits` has it
    visited = rows if candidates.number or draws else min(rows, steps * batch * world)
    drawn = round(visited * per_prompt) if source == "opponent" else 0
    guided = sampling.guidance_scale > 1
    return RoundWork(
        steps=steps,
        scored=scored,
        compared=0 if source == "none" or draws else scored,
        scored_once=rows * copies * 2 * draws,
        drawn=drawn,
        # Of several candidates two are kept, whose encodings are trained on
        encoded=min(drawn, 2 * rows) if candidates.number else drawn,
        views=2 if config.images.random_flip else 1,
        decoded=drawn,
        denoisings=sampling.num_inference_steps * (2 if guided else 1),
        prompts_per_image=1 if zeros_for_empty or not guided else 2,
        forwards=2 if training.gradient_checkpointing else 1,
        trains_weights=not config.lora.use_lora,
    )


def count_units(family: ModuleType, pipeline: Any, resolution: int) -> UnitCosts:
    """The costs of one call of each network of a pipeline, counted on copies that have shapes but no memory; the text
    encoders are run once. `resolution`: height and width of an image, px."""
    config = pipeline.vae.config
    size = resolution // 2 ** (len(config.block_out_channels) - 1)
    frames = torch.tensor([target_frame((resolution, resolution))])
    with torch.no_grad():
        text, embedded = counted(lambda: family.embed(pipeline, ["a prompt"]))
    conditioning = family.condition(embedded, frames)
    added = tuple((name, tensor.shape, tensor.dtype) for name, tensor in (conditioning.added or {}).items())
    forward, backward, through = _count_unet(_shapes(pipeline.unet), conditioning.tokens.shape, added, size)
    encode, decode = _count_vae(_shapes(pipeline.vae), resolution, size)
    return UnitCosts(forward, backward, through, text, encode, decode)


def _shapes(network: Any) -> str:
    """A network's configuration without where it came from: what its costs depend on."""
    return json.dumps({name: value for name, value in network.config.items() if not name.startswith("_")})


# Counting takes a second or more, and a process that plays many runs plays them with the same networks
@functools.cache
def _count_vae(config: str, resolution: int, size: int) -> tuple[int, int]:
    """Encode and decode one image, on `meta`."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads(config))
        pixels = torch.empty(1, vae.config.in_channels, resolution, resolution)
        latents = torch.empty(1, vae.config.latent_channels, size, size)
    with torch.no_grad():
        encode, _ = counted(lambda: vae.encode(pixels))
        decode, _ = counted(lambda: vae.decode(latents))
    return encode, decode


@functools.cache
def _count_unet(
    config: str, tokens: torch.Size, added: tuple[tuple[str, torch.Size, torch.dtype], ...], size: int
) -> tuple[int, int, int]:
    """Forward, backward to all weights, backward through it without its weights; of a UNet on `meta`.

    Args:
        tokens: shape of the text embeddings.
        added: name, shape and dtype of what else the UNet is told.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(config))
        x_t = torch.empty(1, unet.config.in_channels, size, size, requires_grad=True)
        t = torch.zeros(1, dtype=torch.long)
        inputs: dict[str, object] = {"encoder_hidden_states": torch.empty(tokens), "return_dict": False}
        if added:
            inputs["added_cond_kwargs"] = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in added}
    forward, (predicted,) = counted(lambda: unet(x_t, t, **inputs))
    total = predicted.sum()

    def backward(to: list[torch.Tensor]) -> int:
        # The engine computes only what leads to the tensors asked for, as if the others needed no gradient
        return counted(lambda: torch.autograd.grad(total, to, retain_graph=True, allow_unused=True))[0]

    return forward, backward(list(unet.parameters())), backward([x_t])
