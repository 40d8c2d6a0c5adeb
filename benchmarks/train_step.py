"""Time one optimizer step on pairs: this project beside a plain loop that does what the public scripts do.

    python benchmarks/train_step.py --model toy --device cpu
    python benchmarks/train_step.py --model sdxl --device cuda --use_lora --contenders ours --compile blocks

`ours` is a step of a run at its defaults: latents and prompts encoded before, the opponent beside the player; of
`ours_fixed_draws` the opponent's errors are known as well. The `plain` loop is that of diffusers' DPO scripts: it
encodes both images and the captions at every step, with all that is frozen in half precision on a GPU, keeps a second
UNet (or switches the adapters off) for the opponent, and sends both images of a pair through each model in one batch.
All train with fused AdamW on the same pairs, noise and loss. Contenders that are named together share a process, its
memory and its turns; `gpu.sh` gives each a process of its own.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from models import MODELS, build, family_of
from peft import LoraConfig
from timing import alternate, machine, memory_peak, paired_ratio, report, summary, utilisation
from torch.nn.functional import logsigmoid, mse_loss

from spin_diffusion.diffusion.cost import RoundWork, count_units, step_flops
from spin_diffusion.diffusion.denoiser import compile_unet
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import target_frame
from spin_diffusion.diffusion.lora import ATTENTION
from spin_diffusion.diffusion.settings import DenoiserSettings, ImageSettings, SamplingSettings
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.selfplay.train_settings import LoraSettings, TrainSettings
from spin_diffusion.selfplay.trainee import make_optimizer, trained_parameters

BETA, LEARNING_RATE = 2000.0, 1e-8
"""So small a rate that the loss of a random network stays finite over any number of steps."""


def stepping(loss: Callable[[], torch.Tensor], parameters: list[Any]) -> Callable[[], None]:
    """A whole step: loss, backward pass, clipping, fused AdamW."""
    optimizer = make_optimizer(parameters, LEARNING_RATE, TrainSettings())

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(
    args: argparse.Namespace, pipeline: Any, resolution: int, batch: Batch, accelerator: Accelerator, folder: Path
) -> Callable[[], None]:
    """This project's step on cached latents and prompts, which are kept in `folder`."""
    game = DiffusionGame(
        family_of(pipeline), pipeline, "benchmark",
        images=ImageSettings(resolution=resolution), sampling=SamplingSettings(),
        denoiser=DenoiserSettings(compile=args.compile), accelerator=accelerator,
        lora=LoraSettings(use_lora=args.use_lora), gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    game.prompts.keep(folder, batch.prompts, accelerator, dtype)
    if "opponent_score" in batch.real:
        game.release_opponent()
    return stepping(lambda: spin(game.scores(game.player, batch).scores, BETA).mean(), trained_parameters(game))


def plain(
    args: argparse.Namespace, pipeline: Any, pixels: torch.Tensor, prompts: list[str], accelerator: Accelerator
) -> Callable[[], None]:
    """The loop that the public scripts share."""
    device, dtype = accelerator.device, torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    unet = pipeline.unet.requires_grad_(not args.use_lora)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and (name != "unet" or args.use_lora):
            part.requires_grad_(False).to(dtype)
    reference = unet
    if args.use_lora:
        rank = LoraSettings().rank
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)))
        for parameter in unet.parameters():
            parameter.data = parameter.float() if parameter.requires_grad else parameter.data
    else:
        reference = copy.deepcopy(unet).requires_grad_(False).to(dtype)
        compile_unet(reference, args.compile)
    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    compile_unet(unet, args.compile)
    steps = pipeline.scheduler.config.num_train_timesteps
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2, 0).to(device)
    pairs, size = len(prompts), pixels.shape[-1]

    def opponent(noisy: torch.Tensor, t: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            if args.use_lora:
                unet.disable_adapters()
            predicted = reference(noisy, t, **inputs).sample
            if args.use_lora:
                unet.enable_adapters()
        return predicted

    def loss() -> torch.Tensor:
        with accelerator.autocast():
            with torch.no_grad():
                latents = (
                    pipeline.vae.encode(pixels.to(dtype)).latent_dist.sample() * pipeline.vae.config.scaling_factor
                )
                encoded = pipeline.encode_prompt(
                    prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            inputs = {"encoder_hidden_states": encoded[0].repeat(2, 1, 1)}
            if hasattr(pipeline, "text_encoder_2"):
                ids = torch.tensor([[size, size, 0, 0, size, size]], device=device).repeat(2 * pairs, 1)
                inputs["added_cond_kwargs"] = {"text_embeds": encoded[2].repeat(2, 1), "time_ids": ids}
            noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
            t = torch.randint(steps, (pairs,), device=device).repeat(2)
            signal = abar[t][:, None, None, None]
            noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
            errors = [
                mse_loss(each.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3)).chunk(2)
                for each in (unet(noisy, t, **inputs).sample, opponent(noisy, t, inputs))
            ]
            difference = (errors[0][0] - errors[0][1]) - (errors[1][0] - errors[1][1])
            return -logsigmoid(-0.5 * BETA * difference).mean()

    return stepping(loss, [parameter for parameter in unet.parameters() if parameter.requires_grad])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument(
        "--contenders", nargs="+", choices=("ours", "ours_fixed_draws", "plain"), default=["ours", "plain"]
    )
    parser.add_argument("--batch_size", type=int, default=4, help="pairs in a step")
    parser.add_argument("--resolution", type=int, help="px; default: the model's own")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each")
    parser.add_argument("--use_lora", action="store_true", help="train an adapter in place of all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", choices=("no", "blocks", "whole"), default="no")
    return parser.parse_args(argv)


def random_pairs(pairs: int, resolution: int, latent_px: int) -> tuple[torch.Tensor, Batch]:
    """Pixels of both sides for the plain loop, (2 pairs, 3, height, width) in [-1, 1], and a batch for ours."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2 * pairs, 3, resolution, resolution, generator=generator) * 2 - 1
    frames = torch.tensor([target_frame((resolution, resolution))] * pairs, dtype=torch.int32)
    sides = [{"latents": torch.randn(pairs, 4, latent_px, latent_px, generator=generator).half()} for _ in range(2)]
    prompts = [f"a red circle and {number} squares" for number in range(pairs)]
    return pixels, Batch([str(n) for n in range(pairs)], prompts, *sides, list(range(pairs)), {"frame": frames})


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator(mixed_precision="bf16" if args.device == "cuda" else "no", cpu=args.device == "cpu")
    pipeline, resolution = build(args.model, args.device)
    resolution = args.resolution or resolution
    latent_px = resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    pixels, batch = random_pairs(args.batch_size, resolution, latent_px)
    unit = count_units(family_of(pipeline), pipeline, resolution)
    known = {"opponent_score": torch.full((args.batch_size,), -0.5)}
    batches = {"ours": batch}
    batches["ours_fixed_draws"] = replace(batch, real=batch.real | known, generated=batch.generated | known)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for name in args.contenders:
            # A contender that is alone has no second copy of the networks beside it
            own = pipeline if len(args.contenders) == 1 else copy.deepcopy(pipeline)
            contenders[name] = (
                plain(args, own, pixels.to(args.device), batch.prompts, accelerator)
                if name == "plain"
                else ours(args, own, resolution, batches[name], accelerator, Path(folder))
            )
        seconds = alternate(contenders, args.repeats, accelerator.device)
    # Two images a pair: player forward and backward, opponent forward unless its errors are known
    work = RoundWork(1, scored=2, compared=2, drawn=0, encoded=0, decoded=0, denoisings=0)
    work = replace(work, trains_weights=not args.use_lora)
    flops = {n: step_flops(unit, replace(work, compared=0 if n == "ours_fixed_draws" else 2)) for n in seconds}
    again = work.scored * unit.unet if args.gradient_checkpointing else 0
    pace = {name: args.batch_size / summary(times)["median"] for name, times in seconds.items()}
    report(
        {
            "benchmark": "train_step", "model": args.model, "resolution": resolution, "pairs": args.batch_size,
            "use_lora": args.use_lora, "precision": accelerator.mixed_precision,
            "gradient_checkpointing": args.gradient_checkpointing,
            "compile": args.compile, "machine": machine(args.device),
            "flops_of_a_pair": flops, "recomputed_flops_of_a_pair": again,
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "pairs_per_second": pace,
            **utilisation(accelerator.device, pace, flops, again),
            "times_faster": {
                name: paired_ratio(times, seconds["plain"])
                for name, times in seconds.items()
                if "plain" in seconds and name != "plain"
            },
            "peak_memory_bytes": memory_peak(accelerator.device),
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
