"""Time one optimizer step on pairs: this project beside a plain loop that does what the public scripts do.

    python benchmarks/train_step.py --model toy --device cpu
    python benchmarks/train_step.py --model sdxl --device cuda --batch_size 4 --json benchmarks/results/sdxl.json

`ours` is a step of a run at its defaults: latents and prompts encoded before, the opponent beside the player; with
`ours_fixed_draws` (`--fixed_draws`) the opponent's errors are known as well. The plain loop
encodes both images and the captions at every step, keeps a second UNet in fp32, and sends both images of a pair through
each model in one batch. Both train all weights with AdamW on the same pairs, noise and loss.
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
from timing import alternate, machine, paired_ratio, report, summary
from torch.nn.functional import logsigmoid, mse_loss

from spin_diffusion.diffusion.cost import count_units
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import target_frame
from spin_diffusion.diffusion.settings import DenoiserSettings, ImageSettings, SamplingSettings
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.device import matrix_rate
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import make_optimizer

BETA, LEARNING_RATE = 2000.0, 1e-8
"""So small a rate that the loss of a random network stays finite over any number of steps."""


def ours(
    pipeline: Any, resolution: int, batch: Batch, accelerator: Accelerator, options: dict[str, Any], folder: Path,
    compiled: str = "no",
) -> Callable:  # fmt: skip
    """This project's step on cached latents and prompts, which are kept in `folder`."""
    game = DiffusionGame(
        family_of(pipeline), pipeline, "benchmark",
        images=ImageSettings(resolution=resolution), sampling=SamplingSettings(),
        denoiser=DenoiserSettings(compile=compiled), accelerator=accelerator, **options,
    )  # fmt: skip
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    game.prompts.keep(folder, batch.prompts, accelerator, dtype)
    if "opponent_score" in batch.real:
        game.release_opponent()
    optimizer = make_optimizer(list(game.player.parameters()), LEARNING_RATE, TrainSettings())

    def step() -> None:
        loss = spin(game.scores(game.player, batch).scores, BETA).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(game.player.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain(
    pipeline: Any, pixels: torch.Tensor, prompts: list[str], accelerator: Accelerator, options: dict[str, Any]
) -> Callable:
    """The loop that the public scripts share."""
    device, scheduler = accelerator.device, pipeline.scheduler
    unet = pipeline.unet.requires_grad_(True).train()
    reference = copy.deepcopy(unet).requires_grad_(False)
    if options.get("gradient_checkpointing"):
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    steps = scheduler.config.num_train_timesteps
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2, 0).to(device)
    pairs, size = len(prompts), pixels.shape[-1]

    def step() -> None:
        with accelerator.autocast():
            with torch.no_grad():
                latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
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
            predicted = unet(noisy, t, **inputs).sample
            with torch.no_grad():
                predicted_reference = reference(noisy, t, **inputs).sample
            errors = [
                mse_loss(each.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3)).chunk(2)
                for each in (predicted, predicted_reference)
            ]
            difference = (errors[0][0] - errors[0][1]) - (errors[1][0] - errors[1][1])
            loss = -logsigmoid(-0.5 * BETA * difference).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs in a step")
    parser.add_argument("--resolution", type=int, help="px; default: the model's own")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--fixed_draws", action="store_true", help="also with the opponent's errors known")
    parser.add_argument("--compile", choices=("no", "blocks", "whole"), default="no", help="of ours")
    parser.add_argument("--only_ours", action="store_true", help="where the plain loop does not fit in memory")
    return parser.parse_args()


def random_pairs(pairs: int, resolution: int, latent_px: int) -> tuple[torch.Tensor, Batch]:
    """Pixels of both sides for the plain loop, (2 pairs, 3, height, width) in [-1, 1], and a batch for ours."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2 * pairs, 3, resolution, resolution, generator=generator) * 2 - 1
    frames = torch.tensor([target_frame((resolution, resolution))] * pairs, dtype=torch.int32)
    sides = [{"latents": torch.randn(pairs, 4, latent_px, latent_px, generator=generator).half()} for _ in range(2)]
    prompts = [f"a red circle and {number} squares" for number in range(pairs)]
    return pixels, Batch([str(n) for n in range(pairs)], prompts, *sides, list(range(pairs)), {"frame": frames})


def main() -> None:
    args = arguments()
    accelerator = Accelerator(mixed_precision="bf16" if args.device == "cuda" else "no", cpu=args.device == "cpu")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipeline, resolution = build(args.model, args.device)
    resolution = args.resolution or resolution
    latent_px = resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    pixels, batch = random_pairs(args.batch_size, resolution, latent_px)
    options = {"gradient_checkpointing": args.gradient_checkpointing}
    unit = count_units(family_of(pipeline), pipeline, resolution)
    known = {"opponent_score": torch.full((args.batch_size,), -0.5)}
    fixed = replace(batch, real=batch.real | known, generated=batch.generated | known)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        contenders = {
            "ours": ours(copy.deepcopy(pipeline), resolution, batch, accelerator, options, kept, args.compile)
        }
        if args.fixed_draws:
            contenders["ours_fixed_draws"] = ours(
                copy.deepcopy(pipeline), resolution, fixed, accelerator, options, kept, args.compile
            )
        if not args.only_ours:
            contenders["plain"] = plain(pipeline, pixels.to(args.device), batch.prompts, accelerator, options)
        seconds = alternate(contenders, args.repeats, accelerator.device)
    # Two images a pair: player forward and backward, opponent forward unless its errors are known
    opponents = {name: 0 if name == "ours_fixed_draws" else 1 for name in seconds}
    flops = {name: 2 * ((1 + asked) * unit.unet + unit.unet_backward) for name, asked in opponents.items()}
    peak = matrix_rate(accelerator.device, dtype)
    report(
        {
            "benchmark": "train_step", "model": args.model, "resolution": resolution, "pairs": args.batch_size,
            "precision": accelerator.mixed_precision, "gradient_checkpointing": args.gradient_checkpointing,
            "compile": args.compile, "machine": machine(args.device),
            "unet_flops_of_a_pair": flops, "matrix_flops_per_second": peak,
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "pairs_per_second": {n: args.batch_size / summary(s)["median"] for n, s in seconds.items()},
            "mfu": {n: flops[n] * args.batch_size / summary(s)["median"] / peak for n, s in seconds.items()},
            "times_faster": {
                name: paired_ratio(times, seconds["plain"])
                for name, times in seconds.items()
                if "plain" in seconds and name != "plain"
            },
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
