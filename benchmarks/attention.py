"""Time torch's attention kernels on the shapes of a UNet: what `--attention_kernel measure` looks at.

python benchmarks/attention.py --model sdxl --device cuda --json benchmarks/results/sdxl_attention.json
"""

import argparse
from pathlib import Path

import torch
from models import MODELS, build
from timing import machine, report

from spin_diffusion.diffusion.attention import attention_shapes, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch_size", type=int, default=8, help="images")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    pipeline, resolution = build(args.model, args.device)
    shapes = attention_shapes(pipeline.unet, resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    report(
        {
            "benchmark": "attention", "model": args.model, "images": args.batch_size, "machine": machine(args.device),
            "shapes": {" x ".join(map(str, shape)): shapes.count(shape) for shape in dict.fromkeys(shapes)},
            "seconds": measure(shapes, args.batch_size, torch.device(args.device), dtype),
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
