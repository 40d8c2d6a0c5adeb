"""What `--size_conditioning` is worth: a toy set whose pictures are larger than what is drawn, and two bases.

    python benchmarks/size_conditioning.py data runs/toy-sizes
    accelerate launch --config_file training/accelerate/one_cpu.yaml training/train_spin_sdxl.py \\
      --config training/configs/toy_sdxl.yaml --train_data_dir runs/toy-sizes/sloppy --dataset_name null \\
      --max_train_samples null --objective sft --rounds 1 --max_train_steps 100 --compare_with null \\
      --validation_prompts null --output_dir runs/toy-sizes/told
    python benchmarks/size_conditioning.py base runs/toy-sizes
    python evaluation/compare_methods.py --config evaluation/configs/size_conditioning_toy.yaml --jobs 2

The shipped base was told one frame in all its training. The second one, `told-base`, is the first after fine-tuning on
sloppy drawings of these sizes, each told its own, as SDXL was trained.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError

WORLD = Path(__file__).resolve().parent.parent / "assets" / "toy_world"
SHAPES = ((96, 96), (128, 128), (96, 128), (128, 96), (192, 128), (96, 160))
"""Heights and widths, px. The scene fills the short side; along the long one there is background."""


def load_world():
    """The toy world's module, by its path: it is no package."""
    spec = importlib.util.spec_from_file_location("toy_world", WORLD / "world.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawing(world, scene, style: str, shape: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture of a scene in this shape, whose middle shows what a drawing of 64 px shows."""
    side, background = min(shape), world.BACKGROUNDS[scene.background]
    if style == "sloppy":
        square = world.draw(scene, rng, style).resize((side, side), Image.Resampling.BICUBIC)
    else:
        scale = side / world.SIZE_PX
        pixels = np.broadcast_to(np.float32(background), (side, side, 3))
        for item in scene.objects:
            corners = world.outline(item.shape, world.RADII_PX[item.size]) + np.array(world.PLACES[item.place])
            alpha = world.coverage(item.shape, corners * scale, side)[..., None]
            pixels = (1 - alpha) * pixels + alpha * np.float32(world.COLOURS[item.colour])
        square = Image.fromarray(np.rint(pixels).astype(np.uint8))
    picture = Image.new("RGB", (shape[1], shape[0]), background)
    picture.paste(square, ((shape[1] - side) // 2, (shape[0] - side) // 2))
    return picture


def write_data(folder: Path, pictures: int) -> None:
    """`careful` and `sloppy` below `folder`: image folders of other captions."""
    world, rng = load_world(), np.random.default_rng(0)
    for style in ("careful", "sloppy"):
        take_folder(folder / style, "toy pictures", "FOLDER")
        lines = []
        while len(lines) < pictures:
            caption, number = world.sample_caption(rng), len(lines)
            if not world.is_held_out(caption):
                picture = drawing(world, world.parse_caption(caption), style, SHAPES[number % len(SHAPES)], rng)
                picture.save(folder / style / f"{number:05d}.png")
                lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": caption}) + "\n")
        (folder / style / "metadata.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "base"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=192, help="of each style")
    args = parser.parse_args()
    try:
        write(args.what, args.folder, args.pictures)
    except InputError as error:
        parser.error(str(error))


def write(what: str, folder: Path, pictures: int) -> None:
    """The pictures, or the second base, in folders of their own below `folder`; InputError where others' files are."""
    if what == "data":
        write_data(folder, pictures)
    else:
        take_folder(folder / "told-base", "toy base", "FOLDER")
        unet = UNet2DConditionModel.from_pretrained(folder / "told" / "unet")
        StableDiffusionXLPipeline.from_pretrained(WORLD / "sloppy", unet=unet).save_pretrained(folder / "told-base")


if __name__ == "__main__":
    main()
