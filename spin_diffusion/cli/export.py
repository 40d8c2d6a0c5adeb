"""Write what a run made in the form that another program reads.

    spin-diffusion export runs/toy --format kohya          an adapter, for ComfyUI, Forge and A1111
    spin-diffusion export runs/toy --format single_file    a whole checkpoint, for A1111, Forge and ComfyUI
    spin-diffusion export runs/toy --format unet_file      the UNet alone, for ComfyUI's folder diffusion_models
    spin-diffusion export runs/toy --format diffusers      a folder for from_pretrained
    spin-diffusion export runs/toy --round 2 --strength 0.7 --dtype bf16 --format single_file -o toy.safetensors
    spin-diffusion export runs/llm --merge                 a language model's adapter in its base, for vLLM

An adapter is fused into its base, but in kohya's form. What was there before is replaced only if it is an export too.
"""

import argparse
from pathlib import Path


def export(argv: list[str]) -> None:
    """Write the file or the folder, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="--output_dir of a run")
    parser.add_argument("--round", type=int, help="whose player; default: the last promoted one")
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument("--format", choices=["diffusers", "kohya", "single_file", "unet_file"])
    forms.add_argument("--merge", action="store_true", help="an adapter of a language model into its base")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: fp16; bf16 with --merge")
    parser.add_argument("--strength", type=float, default=1.0, help="of images: base + STRENGTH (player - base)")
    parser.add_argument("-o", "--output", type=Path, help="file or folder; default: in RUN/export")
    given = parser.parse_args(argv)
    # After the arguments: --help does not wait for the libraries
    from spin_diffusion.runs import export as exports

    dtype = given.dtype or ("bf16" if given.merge else "fp16")
    what = exports.Export(given.run, given.round, given.format or "diffusers", dtype, given.strength, given.output)
    print(f"Written: {(exports.export_merged if given.merge else exports.export)(what)}")
