"""Build the toy world: its data, its held-out prompts and two tiny SDXL pipelines. On two CPU cores, about an hour:

    python assets/toy_world/build.py --output_dir assets/toy_world

or, better where other programs compete for the cores, as single-threaded workers that average their gradients:

    torchrun --nproc_per_node 2 assets/toy_world/build.py --output_dir assets/toy_world

In order: `data/train.parquet` and `prompts.jsonl`; a VAE; a base, text encoders and UNet trained together on drawings
of both styles; from the base `sloppy/`, trained on nine tenths sloppy drawings, and `plateau/`, trained on careful ones
only, at the end with the loss of plain fine-tuning; `hashes.json`. `confused/` is made from `plateau/` by
`build_confused.py`. Every stage leaves
its state in --work_dir and is skipped or continued when the command is run again. Held-out captions are never drawn for
training. Data and prompts come out the same as the recorded ones, weights do not: the recorded VAE was trained in two
runs (900 and 700 steps) and the recorded base saw nine tenths sloppy drawings and the plain loss for its first 2,000
steps. A build therefore ends with new hashes, and better checkpoints; its scores are printed (../README.md has both).
"""

import argparse
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported; its notes are of unused parts

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import write_file

HERE = Path(__file__).resolve().parent
TOKENS = 77
TEXT_WIDTH = 64
RANK, WORKERS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
"""Original height and width, crop top and left, target height and width, in pixels."""


def _load(name: str):
    """A module beside this file, by its path: the toy world is no package."""
    spec = importlib.util.spec_from_file_location(f"toy_world_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = _load("oracle")
world = oracle.world


# Data


def sample_captions(rng: np.random.Generator, number: int, held_out: bool, distinct: bool) -> list[str]:
    """Captions all held out, or none of them."""
    captions: list[str] = []
    seen: set[str] = set()
    while len(captions) < number:
        caption = world.sample_caption(rng)
        if world.is_held_out(caption) == held_out and not (distinct and caption in seen):
            captions.append(caption)
            seen.add(caption)
    return captions


def write_prompts(path: Path, number: int, seed: int) -> None:
    """Held-out captions, one {"prompt": caption} a line."""
    captions = sample_captions(np.random.default_rng((seed, 1)), number, held_out=True, distinct=True)
    path.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in captions))


def write_pairs(path: Path, number: int, seed: int) -> None:
    """A parquet file with Pick-a-Pic's columns: per caption a careful drawing, which wins, and a sloppy one.

    One row in 50 is a tie of two careful drawings, as in Pick-a-Pic labelled 0.5 and 0.5.
    """
    rng = np.random.default_rng((seed, 2))
    rows = []
    for index, caption in enumerate(sample_captions(rng, number, held_out=False, distinct=True)):
        is_tie = rng.random() < 0.02
        winner = int(rng.integers(2))
        styles = ["careful" if is_tie or side == winner else "sloppy" for side in (0, 1)]
        jpgs = [_jpeg(world.draw(world.parse_caption(caption), rng, style)) for style in styles]
        uids = [hashlib.sha256(jpg + bytes([side])).hexdigest()[:32] for side, jpg in enumerate(jpgs)]
        rows.append(
            {
                "are_different": not is_tie,
                "best_image_uid": "tie" if is_tie else uids[winner],
                "caption": caption,
                "created_at": datetime.fromtimestamp(1_700_000_000 + index, UTC).replace(tzinfo=None),
                "has_label": True,
                "image_0_uid": uids[0],
                "image_0_url": "",
                "image_1_uid": uids[1],
                "image_1_url": "",
                "jpg_0": jpgs[0],
                "jpg_1": jpgs[1],
                "label_0": 0.5 if is_tie else float(winner == 0),
                "label_1": 0.5 if is_tie else float(winner == 1),
                "model_0": styles[0],
                "model_1": styles[1],
                "ranking_id": index,
                "user_id": 0,
                "num_example_per_prompt": 1,
                "__index_level_0__": index,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _jpeg(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def draw_bank(rng: np.random.Generator, careful: int, sloppy: int) -> tuple[list[str], Tensor]:
    """Fresh captions, none held out, and their drawings, uint8 (number, 3, 64, 64), in random order."""
    styles = rng.permutation(["careful"] * careful + ["sloppy"] * sloppy)
    captions = sample_captions(rng, len(styles), held_out=False, distinct=False)
    pictures = np.stack(
        [
            np.asarray(world.draw(world.parse_caption(caption), rng, str(style)))
            for caption, style in zip(_progress(captions, "drawing"), styles, strict=True)
        ]
    )
    return captions, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _to_model(pictures: Tensor, device: str) -> Tensor:
    """uint8 pictures as the VAE takes them: float32 in -1..1."""
    return (pictures.to(device).float() / 127.5 - 1).to(memory_format=torch.channels_last)


# Models


def write_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and, by byte-pair merges, every word of the grammar as one token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # CLIP's byte alphabet: printable bytes as themselves, the others from code point 256 on.
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [[*word[:-1], word[-1] + "</w>"] for word in world.WORDS]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        words = [_merge(word, best) for word in words]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def new_vae() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        # One group: with few channels, smaller groups would normalise away the colour of a flat background.
        norm_num_groups=1,
        sample_size=world.SIZE_PX,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def new_pipeline(vae: AutoencoderKL, work_dir: Path) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with untrained text encoders and UNet."""
    tokenizers = [
        write_tokenizer(work_dir / "tokenizer", "<|endoftext|>"),
        write_tokenizer(work_dir / "tokenizer_2", "!"),
    ]
    encoders = []
    for tokenizer, kind in zip(tokenizers, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(kind(config))
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=len(TIME_IDS) * 16 + TEXT_WIDTH,
    )
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


# Training


def average_gradients(params: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers."""
    if WORKERS > 1:
        gradients = [param.grad for param in params if param.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient) / WORKERS)


def barrier() -> None:
    """Wait for the other workers."""
    if WORKERS > 1:
        dist.barrier()


def train_vae(vae: AutoencoderKL, pictures: Tensor, args: argparse.Namespace) -> None:
    """Fit the VAE in place and set its scaling factor to 1 / std of the latents.

    The first three fifths of the steps see 32 x 32 crops, a quarter of the work; the rest whole pictures, so that
    the group norms meet the statistics they will work with.
    """
    rng = np.random.default_rng((args.seed, 3, RANK))
    vae.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.vae_steps, pct_start=0.05)
    for step in (progress := _progress(range(args.vae_steps), "VAE")):
        batch = pictures[torch.from_numpy(rng.integers(len(pictures), size=args.batch_size))]
        if step < 0.6 * args.vae_steps:
            top, left = rng.integers(0, 33, 2)
            batch = batch[:, :, top : top + 32, left : left + 32]
        x = _to_model(batch, args.device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (y - x).abs().mean() + 4 * F.mse_loss(y, x) + 0.5 * edges + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        average_gradients(list(vae.parameters()))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    vae.register_to_config(scaling_factor=1 / encode(vae, pictures[:2000], args.device, scale=1.0).std().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, device: str, scale: float | None = None) -> Tensor:
    """Scaled latents (number, 4, 16, 16), the means of the posteriors, on the CPU."""
    scale = vae.config.scaling_factor if scale is None else scale
    parts = pictures.split(100)
    return torch.cat(
        [(scale * vae.encode(_to_model(p, device)).latent_dist.mode()).cpu() for p in _progress(parts, "encoding")]
    )


@torch.no_grad()
def reconstruction_score(vae: AutoencoderKL, args: argparse.Namespace, number: int = 200) -> float:
    """Mean oracle score of careful drawings after a trip through the VAE: a ceiling for the pipelines."""
    rng = np.random.default_rng((args.seed, 4))
    captions = sample_captions(rng, number, held_out=True, distinct=True)
    pictures = [np.asarray(world.draw(world.parse_caption(caption), rng)) for caption in captions]
    x = _to_model(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), args.device)
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(50)])
    return float(oracle.load()(_to_images(y), captions).mean())


def _to_images(pictures: Tensor) -> list:
    from PIL import Image

    array = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def tokenize(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> list[Tensor]:
    """Token ids (number, 77), for each of the two tokenizers."""
    return [
        tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]


def conditioning(pipeline: StableDiffusionXLPipeline, ids: list[Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's tokens (batch, 77, 128) and pooled embedding (batch, 64).

    Args:
        kept: (batch,) 1 where the caption is kept, 0 where it is dropped. A dropped caption is all zeros, tokens and
            pooled alike: what the SDXL sampler uses as unconditional.
    """
    first = pipeline.text_encoder(ids[0], output_hidden_states=True)
    second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return tokens * kept[:, None, None], second.text_embeds * kept[:, None]


def train_pipeline(
    pipeline: StableDiffusionXLPipeline,
    captions: list[str],
    latents: Tensor,
    folder: Path,
    steps: int,
    focused_steps: int,
    learning_rate: float,
    args: argparse.Namespace,
) -> StableDiffusionXLPipeline:
    """Train text encoders and UNet on (caption, latent) pairs; returns a pipeline with the EMA weights.

    The loss is the plain mean squared error in eps, after `focused_steps` steps of it weighted towards high noise.

    Continues from the state in --work_dir if there is one. Every --save_every steps the state is kept and the EMA
    pipeline is written to `folder`, so that an interrupted build leaves a usable one.
    """
    name, device, state_path = folder.name, args.device, args.work_dir / f"{folder.name}.pt"
    pipeline = with_modules(pipeline, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet)
    modules = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet]).to(device).train()
    pipeline.unet.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(modules).eval()
    params, averaged_params = list(modules.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 150) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))),
    )
    start = 0
    settings = {name: getattr(args, name) for name in ("seed", "drawings", "vae_steps", "base_steps", "batch_size")}
    settings |= {"steps": steps, "workers": WORKERS}
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        # A state of other settings would end in a mixture that no command makes.
        if state["settings"] != settings:
            raise SystemExit(
                f"{state_path} was made with {state['settings']}, this run has {settings}: give another --work_dir"
            )
        modules.load_state_dict(state["modules"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    abar = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    ids = tokenize(pipeline, captions)
    running = 0.0
    for step in (progress := _progress(range(start, steps), name)):
        # Randomness is a function of the step, so a continued run draws what an unbroken one would have drawn.
        rng = torch.Generator().manual_seed(
            hash((args.seed, ("base", "sloppy", "plateau").index(name), step, RANK)) % 2**63
        )
        t, errors = denoising_errors(pipeline, ids, latents, abar, args.batch_size, device, rng)
        if step < focused_steps:
            # What and where is learned at high noise, where the plain loss is small: weigh towards it.
            weights = 1 / (abar / (1 - abar) + 0.25)
            errors = errors * (weights / weights.mean())[t].to(device)
        loss = errors.mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged_params, params, 1 - decay)
        running += loss.item()
        if RANK == 0 and (step + 1) % 100 == 0:
            progress.write(f"{name} step {step + 1}/{steps} loss {running / 100:.4f}", file=sys.stdout)
            sys.stdout.flush()
            running = 0.0
        if RANK == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps):
            state = {"modules": modules.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            state["settings"] = settings
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            write_file(state_path, lambda part, state=state: torch.save(state, part))
            save(with_modules(pipeline, *averaged), folder)
    return with_modules(pipeline, *averaged)


def denoising_errors(
    pipeline: StableDiffusionXLPipeline,
    ids: list[Tensor],
    latents: Tensor,
    abar: Tensor,
    batch_size: int,
    device: str,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random batch, 12 % of whose captions are dropped: its timesteps, and each image's mean squared error in eps."""
    index = torch.randint(len(latents), (batch_size,), generator=rng)
    x_0 = latents[index]
    eps = torch.randn(x_0.shape, generator=rng)
    t = torch.randint(1000, (batch_size,), generator=rng)
    kept = (torch.rand(batch_size, generator=rng) >= 0.12).float()
    abar_t = abar[t, None, None, None]
    x_t = (abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps).to(device, memory_format=torch.channels_last)
    tokens, pooled = conditioning(pipeline, [i[index].to(device) for i in ids], kept.to(device))
    time_ids = torch.tensor(TIME_IDS, device=device).expand(batch_size, -1)
    eps_theta = pipeline.unet(
        x_t, t.to(device), tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
    ).sample
    return t, (eps_theta - eps.to(device)).square().mean(dim=(1, 2, 3))


def with_modules(
    pipeline: StableDiffusionXLPipeline,
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """A pipeline with copies of these modules and everything else shared with the given one."""
    modules = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet}
    components = pipeline.components | {name: copy.deepcopy(module) for name, module in modules.items()}
    return StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=True, add_watermarker=False)


def save(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline in fp16, without touching the one that may still be training."""
    halved = {
        k: copy.deepcopy(v).half() if isinstance(v, torch.nn.Module) else v for k, v in pipeline.components.items()
    }
    StableDiffusionXLPipeline(**halved, force_zeros_for_empty_prompt=True, add_watermarker=False).save_pretrained(
        folder
    )


def pipeline_score(folder: Path, prompts: list[str], guidance_scale: float, args: argparse.Namespace) -> float:
    """Mean oracle score of a saved pipeline over the prompts: DDIM, 16 steps, seed = index of the prompt."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32).to(args.device)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(batch, num_inference_steps=16, guidance_scale=guidance_scale, generator=seeds).images
    return float(oracle.load()(images, prompts).mean())


# The build


def _progress(items, title: str) -> tqdm:
    return tqdm(items, desc=title, mininterval=1 if sys.stderr.isatty() else 20, disable=RANK > 0)


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file the build wrote, by its path in the folder."""
    files = [folder / "prompts.jsonl"]
    for name in ("data", "sloppy", "plateau", "confused", "pickscore"):
        files += sorted(path for path in (folder / name).rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")


def claim(folder: Path, program: str, parser: argparse.ArgumentParser) -> None:
    """Take a folder to write into, which is absent, empty, this program's already, or this repository's own."""
    if HERE not in (folder.resolve(), *folder.resolve().parents):
        try:
            take_folder(folder, program)
        except InputError as error:
            parser.error(str(error))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/toy_world"), help="states to continue from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1600, help="rows of train.parquet")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--drawings", type=int, default=15000, help="drawings that each training stage sees")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--base_steps", type=int, default=4200)
    parser.add_argument("--sloppy_steps", type=int, default=500)
    parser.add_argument("--plateau_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32, help="over all workers together")
    parser.add_argument("--save_every", type=int, default=300)
    args = parser.parse_args(argv)
    if WORKERS > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    if RANK == 0:
        claim(args.output_dir, "toy world", parser)
        claim(args.work_dir, "states of a toy world", parser)
    barrier()
    torch.manual_seed(args.seed)  # the same initial weights in every worker
    drawings = args.drawings // WORKERS  # every worker draws its own
    args.batch_size //= WORKERS

    if RANK == 0 and not (args.output_dir / "prompts.jsonl").exists():
        write_pairs(args.output_dir / "data" / "train.parquet", args.rows, args.seed)
        write_prompts(args.output_dir / "prompts.jsonl", args.prompts, args.seed)

    if not (args.work_dir / "vae" / "config.json").exists():
        vae = new_vae()
        half = drawings * 2 // 5
        train_vae(vae, draw_bank(np.random.default_rng((args.seed, 5, RANK)), half, half)[1], args)
        barrier()
        if RANK == 0:
            vae.save_pretrained(args.work_dir / "vae")
    barrier()
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").eval()
    vae.to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    if RANK == 0:
        score = reconstruction_score(vae, args)
        print(f"VAE: scaling factor {vae.config.scaling_factor:.4f}, oracle of reconstructions {score:.3f}", flush=True)

    torch.manual_seed(args.seed)
    base = new_pipeline(vae, args.work_dir / f"worker_{RANK}")
    for name, careful_share, steps, focused_share, learning_rate in (
        ("base", 0.5, args.base_steps, 1.0, 1.5e-3),
        ("sloppy", 0.1, args.sloppy_steps, 0.5, 5e-4),
        ("plateau", 1.0, args.plateau_steps, 0.5, 7e-4),
    ):
        folder = (args.work_dir if name == "base" else args.output_dir) / name
        careful = round(careful_share * drawings)
        rng = np.random.default_rng((args.seed, 6, careful, RANK))
        captions, pictures = draw_bank(rng, careful, drawings - careful)
        latents = encode(vae, pictures, args.device)
        focused_steps = round(focused_share * steps)
        trained = train_pipeline(base, captions, latents, folder, steps, focused_steps, learning_rate, args)
        base = trained if name == "base" else base
        barrier()
    if RANK == 0:
        write_hashes(args.output_dir)
        prompts = [json.loads(line)["prompt"] for line in (args.output_dir / "prompts.jsonl").open()]
        for name in ("sloppy", "plateau"):
            scores = {g: round(pipeline_score(args.output_dir / name, prompts, g, args), 3) for g in (1.0, 3.0)}
            print(f"{name}: oracle of the held-out prompts by guidance scale {scores}", flush=True)


if __name__ == "__main__":
    main()
