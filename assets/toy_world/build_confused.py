"""Build the toy world's third base, `confused/`: it often draws the wrong colour or shape. On one CPU core,
about a quarter of an hour:

    python assets/toy_world/build_confused.py

Trains only the UNet of `plateau/`, in three stages of plain fine-tuning (each first weighted towards high noise, as
`build.py` does it), on careful drawings in which the colour and the shape of every object are swapped for their
partner's (`world.PARTNERS`) with the probabilities in `STAGES`, anew in every drawing. The first stage confuses; the
later ones bring the shares down to those that are meant, and draw more cleanly. The other parts are plateau's files.

Why by chance: the model becomes *uncertain*. By the seed, a caption gets the right picture or a wrong one, so the
opponent draws both, and a comparison with the real image has something to prefer. A fixed permutation would leave it
sure of the wrong word, which is another caption to learn, and no sample of its opponent would be right.

Why one partner, not any of the other five: guidance w sharpens p(picture | caption) roughly to its power w, so five
wrong colours of 0.1 each beside a right one of 0.5 are gone at guidance 3, while two near halves stay near halves.

Every --save_every steps the state is kept in --work_dir, and the same command goes on from there to the same bytes on
the same machine. Ends with the parts of the oracle on the held-out prompts and with new `hashes.json`.
"""

import argparse
import copy
import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
STAGES = ((600, 0.45, 0.45), (400, 0.4, 0.25), (300, 0.3, 0.2))
"""Steps, probability of a swapped colour, probability of a swapped shape."""


def _load(name: str):
    """A module beside this file, by its path: the toy world is no package."""
    spec = importlib.util.spec_from_file_location(f"toy_world_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load("build")
cleanliness = _load("cleanliness")
oracle, world = build.oracle, build.world


def confuse(scene: "world.Scene", rng: np.random.Generator, swap_colour: float, swap_shape: float) -> "world.Scene":
    """The scene with the colour and the shape of each object swapped for their partners with these probabilities."""
    objects = []
    for item in scene.objects:
        colour = world.PARTNERS[item.colour] if rng.random() < swap_colour else item.colour
        shape = world.PARTNERS[item.shape] if rng.random() < swap_shape else item.shape
        objects.append(replace(item, colour=colour, shape=shape))
    return replace(scene, objects=tuple(objects))


def draw_confused_bank(
    rng: np.random.Generator, number: int, swap_colour: float, swap_shape: float
) -> tuple[list[str], Tensor]:
    """Captions, none held out, and careful drawings of what each was confused with, uint8 (number, 3, 64, 64)."""
    captions = build.sample_captions(rng, number, held_out=False, distinct=False)
    pictures = np.stack(
        [
            np.asarray(world.draw(confuse(world.parse_caption(caption), rng, swap_colour, swap_shape), rng))
            for caption in build._progress(captions, "drawing")
        ]
    )
    return captions, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def train_unet(
    pipeline: StableDiffusionXLPipeline, captions: list[str], latents: Tensor, stage: int, args: argparse.Namespace
) -> torch.nn.Module:
    """Fine-tune a copy of the pipeline's UNet on (caption, latent) pairs; returns the EMA of its weights, fp32.

    Continues from the stage's state in --work_dir if there is one.
    """
    steps = STAGES[stage][0]
    settings = {name: getattr(args, name) for name in ("seed", "drawings", "learning_rate", "batch_size")}
    settings["stages"] = [list(entry) for entry in STAGES[: stage + 1]]
    state_path = args.work_dir / f"confused_{stage}.pt"
    unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(unet).eval()
    params, averaged_params = list(unet.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        # A state of other settings would end in a mixture that no command makes.
        if state["settings"] != settings:
            raise SystemExit(
                f"{state_path} was made with {state['settings']}, this run has {settings}: give another --work_dir,"
                f" or delete that file"
            )
        unet.load_state_dict(state["unet"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    abar = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    weights = 1 / (abar / (1 - abar) + 0.25)
    ids = build.tokenize(pipeline, captions)
    time_ids = torch.tensor(build.TIME_IDS).expand(args.batch_size, -1)
    losses = []
    for step in (progress := build._progress(range(start, steps), f"stage {stage + 1} of {len(STAGES)}")):
        # Randomness is a function of the step, so a continued run draws what an unbroken one would have drawn.
        rng = np.random.default_rng((args.seed, 8, step, stage))
        index = torch.from_numpy(rng.integers(len(latents), size=args.batch_size))
        x_0 = latents[index]
        eps = torch.from_numpy(rng.standard_normal(tuple(x_0.shape), dtype=np.float32))
        t = torch.from_numpy(rng.integers(1000, size=args.batch_size))
        kept = torch.from_numpy(rng.random(args.batch_size) >= 0.12).float()
        abar_t = abar[t, None, None, None]
        x_t = (abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps).to(memory_format=torch.channels_last)
        with torch.no_grad():
            tokens, pooled = build.conditioning(pipeline, [i[index] for i in ids], kept)
        eps_theta = unet(x_t, t, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
        errors = (eps_theta - eps).square().mean(dim=(1, 2, 3))
        if step < steps // 2:
            # Colour and shape are decided at high noise.
            errors = errors * (weights / weights.mean())[t]
        loss = errors.mean()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged_params, params, 1 - min(0.99, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {"unet": unet.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "settings": settings}
            build.write_file(state_path, lambda part, state=state: torch.save(state, part))
    return averaged


def learning_rate_factor(step: int, steps: int) -> float:
    """50 steps of warm-up, then a half cosine down to 0.02."""
    return min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def write_base(unet: torch.nn.Module, parent: Path, folder: Path) -> None:
    """The parent's files with this UNet's weights in fp16."""
    shutil.copytree(parent, folder, dirs_exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in unet.state_dict().items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def parts(folder: Path, prompts: list[str], guidance_scale: float) -> dict[str, float]:
    """Mean parts of the oracle's score and the mean cleanliness: DDIM, 16 steps, seed = index of the prompt."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in build._progress(range(0, len(prompts), 50), f"{folder.name} at guidance {guidance_scale:g}"):
        batch = prompts[start : start + 50]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(batch, num_inference_steps=16, guidance_scale=guidance_scale, generator=seeds).images
    found = [oracle.details(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    names = ("colour", "shape", "size", "place", "background", "score")
    means = {name: float(np.mean([entry[name] for entry in found])) for name in names}
    return means | {"cleanliness": float(cleanliness.load()(images, prompts).mean())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="holds plateau/, gets confused/")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/toy_world"), help="the state to continue from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawings", type=int, default=6000)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--save_every", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts to measure the result on")
    args = parser.parse_args(argv)
    parent = args.output_dir / "plateau"
    if not (parent / "model_index.json").exists():
        parser.error(f"{parent} holds no pipeline: build.py makes it")
    torch.set_num_threads(1)  # the order of sums, and with it the bytes, depends on the number of threads
    build.claim(args.output_dir, "toy world", parser)
    build.claim(args.work_dir, "states of a toy world", parser)

    pipeline = StableDiffusionXLPipeline.from_pretrained(parent, torch_dtype=torch.float32)
    for stage, (_, swap_colour, swap_shape) in enumerate(STAGES):
        rng = np.random.default_rng((args.seed, 7, stage))
        captions, pictures = draw_confused_bank(rng, args.drawings, swap_colour, swap_shape)
        latents = build.encode(pipeline.vae, pictures, "cpu")
        pipeline.unet = train_unet(pipeline, captions, latents, stage, args)
    folder = args.output_dir / "confused"
    write_base(pipeline.unet, parent, folder)
    build.write_hashes(args.output_dir)
    lines = (args.output_dir / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][: args.prompts]
    for guidance_scale in (1.0, 3.0):
        for base in (parent, folder):
            found = parts(base, prompts, guidance_scale)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{base.name} at guidance {guidance_scale:g}: {shown}", flush=True)


if __name__ == "__main__":
    main()
