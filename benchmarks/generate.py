"""Time drawing images: this project's sampler beside diffusers' own pipeline as it comes.

    python benchmarks/generate.py --model toy --device cpu
    python benchmarks/generate.py --model sdxl --device cuda --batch_size 16 --contenders ours --compile blocks

Both draw the same prompts with guidance and the same number of steps. diffusers' pipeline draws one prompt after
another with the checkpoint's scheduler, in fp16 on a GPU, as its documentation shows it (`--reference_batched`: all
prompts in one call); ours draws batches in the run's precision. Contenders that are named together share a process, its
memory and its turns; `gpu.sh` gives each a process of its own.
"""

import argparse
import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from models import MODELS, build, family_of
from timing import alternate, machine, memory_peak, paired_ratio, report, summary, utilisation

from spin_diffusion.diffusion.cost import count_units
from spin_diffusion.diffusion.denoiser import compile_unet
from spin_diffusion.diffusion.sampling import draw_images, sampling_pipeline
from spin_diffusion.diffusion.settings import SamplingSettings
from spin_diffusion.samples.sampling import precision_of
from spin_diffusion.selfplay.device import autocast_dtype, cast_for_autocast


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--contenders", nargs="+", choices=("ours", "diffusers"), default=["ours", "diffusers"])
    parser.add_argument("--batch_size", type=int, default=8, help="images that ours draws at a time")
    parser.add_argument("--images", type=int, help="images in a turn; default: the batch size")
    parser.add_argument("--resolution", type=int, help="px; default: the model's own")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each")
    parser.add_argument("--reference_batched", action="store_true", help="diffusers draws all prompts in one call")
    parser.add_argument("--compile", choices=("no", "blocks", "whole"), default="no")
    args = parser.parse_args(argv)

    accelerator = Accelerator(mixed_precision="bf16" if args.device == "cuda" else "no", cpu=args.device == "cpu")
    pipeline, resolution = build(args.model, args.device)
    resolution = args.resolution or resolution
    count = args.images or args.batch_size
    prompts = [f"a red circle and {number} squares" for number in range(count)]
    stock = pipeline if args.contenders == ["diffusers"] else copy.deepcopy(pipeline)
    if args.device == "cuda":
        stock.to(dtype=torch.float16)  # as the documentation loads it
    stock.set_progress_bar_config(disable=True)
    if "ours" in args.contenders:
        cast_for_autocast(pipeline.unet, autocast_dtype(accelerator.mixed_precision))  # as a run's opponent
        pipeline.unet.to(memory_format=torch.channels_last)
    for unet in {pipeline.unet, stock.unet}:
        compile_unet(unet, args.compile)
    settings = SamplingSettings(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    sampling = settings.record(resolution, precision_of(accelerator.mixed_precision))
    made = sampling_pipeline(pipeline, pipeline.unet, sampling.sampler)

    def ours() -> None:
        draw_images(made, prompts, list(range(count)), sampling, batch_size=args.batch_size)

    def diffusers() -> None:
        for part in [prompts] if args.reference_batched else [[prompt] for prompt in prompts]:
            stock(
                part, height=resolution, width=resolution, num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
            )  # fmt: skip

    contenders = {name: {"ours": ours, "diffusers": diffusers}[name] for name in args.contenders}
    seconds = alternate(contenders, args.repeats, accelerator.device, warmup=1)
    unit = count_units(family_of(pipeline), pipeline, resolution)
    flops = sampling.passes * unit.unet + unit.vae_decode
    pace = {name: count / summary(times)["median"] for name, times in seconds.items()}
    report(
        {
            "benchmark": "generate", "model": args.model, "resolution": resolution, "images": count,
            "batch_size": args.batch_size, "steps": args.num_inference_steps, "guidance": args.guidance_scale,
            "reference_batched": args.reference_batched, "precision": accelerator.mixed_precision,
            "compile": args.compile, "machine": machine(args.device),
            "flops_of_an_image": flops,
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "images_per_second": pace,
            **utilisation(accelerator.device, pace, dict.fromkeys(pace, flops)),
            "times_faster": paired_ratio(seconds["ours"], seconds["diffusers"]) if len(seconds) > 1 else None,
            "peak_memory_bytes": memory_peak(accelerator.device),
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
