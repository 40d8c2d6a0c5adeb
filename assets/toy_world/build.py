"""Build the toy world: its data, its held-out prompts and three tiny SDXL pipelines, in two hours of a core:

    OMP_NUM_THREADS=1 python assets/toy_world/build.py --output_dir assets/toy_world

In order: `data/train.parquet` and `prompts.jsonl`; a VAE; `plateau/`, text encoders and UNet trained together on
careful drawings, in the end by the loss of plain fine-tuning until the rate has fallen to 0; from it, training the
UNet alone, `sloppy/` (nine tenths sloppy drawings) and `confused/`; `hashes.json`. Held-out captions are never drawn
for training, and no drawing is seen for longer than one bank of them, so that `plateau` stands where its loss has its
minimum among UNets of its size: what it lacks, more fine-tuning does not give it.

`confused` is trained on drawings in which a colour or shape that the caption says is swapped for its partner's
(`world.PARTNERS`) by chance, anew in every drawing, so that the model is unsure and not sure of another word: by the
seed it draws the right picture or a wrong one. For one partner, since guidance would silence errors spread over five.

Every --save_every steps the state is kept in --work_dir, and the same command goes on from there to the same bytes on
the same machine with the same number of threads.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported; its notes are of unused parts

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spin_diffusion.diffusion.images import through_codec, to_images, to_pixels
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.named import load_module
from spin_diffusion.store.run_dir import write_file, write_folder

HERE = Path(__file__).resolve().parent
TOKENS = 16
TEXT_WIDTH = 32
FRAME_WIDTH = 8
TRAINED = ("text_encoder", "text_encoder_2", "unet")
BANK_STEPS = 3000
"""Steps until another bank of drawings is drawn."""
Batch = dict[str, Tensor | list[str]]


@dataclass(frozen=True)
class Stage:
    """One training of a UNet: from which stage it goes on, for how long, and on what drawings."""

    parent: str | None
    """None = untrained; the text encoders are then trained too."""
    steps: int
    learning_rate: float
    focused_steps: int
    """Steps in which the loss is weighed towards high noise, where what and where are decided."""
    careful_share: float = 1.0
    swap_colour: float = 0.0
    swap_shape: float = 0.0


STAGES = {
    "plateau": Stage(None, 16000, 2e-3, 4000),
    "sloppy": Stage("plateau", 600, 7e-4, 0, careful_share=0.1),
    "confused": Stage("plateau", 1000, 7e-4, 500, swap_colour=0.4, swap_shape=0.25),
}

oracle = load_module("", str(HERE / "oracle.py"))
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
    """A parquet file with Pick-a-Pic's columns: per caption a careful drawing, which wins, and a sloppy one
    of the same size.

    One row in 50 is a tie of two careful drawings, as in Pick-a-Pic labelled 0.5 and 0.5.
    """
    rng = np.random.default_rng((seed, 2))
    rows = []
    for index, caption in enumerate(sample_captions(rng, number, held_out=False, distinct=True)):
        is_tie = rng.random() < 0.02
        winner = int(rng.integers(2))
        styles = ["careful" if is_tie or side == winner else "sloppy" for side in (0, 1)]
        scene, size_px = world.complete(world.parse_caption(caption), rng), world.sample_size(rng)
        jpgs = [_jpeg(world.draw(scene, rng, style, size_px)) for style in styles]
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


def confuse(scene: "world.Scene", rng: np.random.Generator, swap_colour: float, swap_shape: float) -> "world.Scene":
    """The scene with its colour and its shape, where said, swapped for their partners with these probabilities."""
    swaps = {"colour": swap_colour, "shape": swap_shape}
    swapped = {part: rng.random() < share and getattr(scene, part) is not None for part, share in swaps.items()}
    return replace(scene, **{part: world.PARTNERS[getattr(scene, part)] for part in swaps if swapped[part]})


def cut(picture: Image.Image, place: float) -> tuple[Image.Image, list[int]]:
    """The picture, its shorter side 64 px, cut to a square at a place in [0, 1] along the longer one; and its frame as
    SDXL is told it: original height and width, top, left, target height and width, px."""
    scale = 64 / min(picture.size)
    width, height = (max(64, round(side * scale)) for side in picture.size)
    left, top = (round((side - 64) * place) for side in (width, height))
    square = picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + 64, top + 64))
    return square, [picture.height, picture.width, top, left, 64, 64]


def draw_bank(rng: np.random.Generator, number: int, stage: Stage) -> list[tuple[str, Image.Image, list[int]]]:
    """Captions, none held out, their drawings, and what SDXL is told of each: original height and width, crop top and
    left, height and width in px.

    A drawing that is no square is in one of two cut to one, anywhere: a place that is told."""
    entries = []
    for caption in _progress(sample_captions(rng, number, held_out=False, distinct=False), "drawing"):
        scene = confuse(world.parse_caption(caption), rng, stage.swap_colour, stage.swap_shape)
        style = "careful" if rng.random() < stage.careful_share else "sloppy"
        width, height = world.sample_size(rng)
        is_cut, picture = rng.random() < 0.5, world.draw(scene, rng, style, (width, height))
        place = float(rng.random())
        picture, frame = cut(picture, place) if is_cut else (picture, [height, width, 0, 0, height, width])
        entries.append((caption, through_codec([picture], ImageSettings())[0], frame))
    return entries


def places_by_size(pictures: list[Image.Image]) -> list[np.ndarray]:
    """Where the pictures of each size are."""
    sizes = sorted({picture.size for picture in pictures})
    return [np.array([i for i, picture in enumerate(pictures) if picture.size == size]) for size in sizes]


def choose(groups: list[np.ndarray], rng: np.random.Generator, number: int) -> np.ndarray:
    """Places out of one group (number,), the groups by their shares."""
    counts = np.array([len(group) for group in groups])
    return rng.choice(groups[rng.choice(len(groups), p=counts / counts.sum())], size=number)


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
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def new_text_encoder(kind: type[CLIPTextModel], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder."""
    encoder = kind(
        CLIPTextConfig(
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
    )
    # CLIP's .02 is for a training that is long: words that are told apart from the start are learned sooner.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return encoder


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet that is told of text and frame as SDXL's is."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=FRAME_WIDTH,
        projection_class_embeddings_input_dim=6 * FRAME_WIDTH + TEXT_WIDTH,
    )


def new_pipeline(vae: AutoencoderKL, work_dir: Path) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with untrained text encoders and UNet."""
    tokenizer = write_tokenizer(work_dir / "tokenizer", "<|endoftext|>")
    tokenizer_2 = write_tokenizer(work_dir / "tokenizer_2", "!")
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return pipeline_of(
        vae=vae,
        text_encoder=new_text_encoder(CLIPTextModel, tokenizer),
        text_encoder_2=new_text_encoder(CLIPTextModelWithProjection, tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=new_unet(),
        scheduler=scheduler,
    )


def pipeline_of(**components) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=True, add_watermarker=False)


# Training


def train(
    name: str,
    modules: nn.Module,
    steps: int,
    learning_rate: float,
    loss: Callable[[int], Tensor],
    args: argparse.Namespace,
) -> nn.Module:
    """Minimise `loss(step)` over the parameters of `modules` that take gradients; returns the average of their weights.

    AdamW; the rate rises for 100 steps and falls to 0 over the last half of all steps. Continues from the state in
    --work_dir if there is one.
    """
    state_path = args.work_dir / f"{name}.pt"
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "work_dir", "save_every")}
    settings |= {"steps": steps, "learning_rate": learning_rate}
    averaged = copy.deepcopy(modules).eval()
    params, averaged_params = list(modules.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(
        [p for p in params if p.requires_grad], betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    start = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        # A state of other settings would end in a mixture that no command makes.
        if state["settings"] != settings:
            raise SystemExit(
                f"{state_path} was made with {state['settings']}, this run has {settings}: give another --work_dir"
            )
        modules.load_state_dict(state["modules"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    losses = []
    for step in (progress := _progress(range(start, steps), name)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100, 2 * (1 - step / steps))
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged_params, params, 1 - min(0.998, (1 + step) / (10 + step)))
        losses.append(value.item())
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            progress.write(f"{name} step {step + 1} of {steps}: loss {np.mean(losses):.4f}", file=sys.stdout)
            losses = []
            state = {"modules": modules.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "settings": settings}
            write_file(state_path, lambda part, state=state: torch.save(state, part))
    return averaged


def train_vae(args: argparse.Namespace) -> AutoencoderKL:
    """A VAE of drawings of both styles, with the scaling factor 1 / std of the latents.

    The first four fifths of the steps see 32 x 32 crops, a quarter of the work; the rest whole pictures, so that the
    group norms meet the statistics they will work with.
    """
    torch.manual_seed(args.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    rng = np.random.default_rng((args.seed, 3))
    pictures = [picture for _, picture, _ in draw_bank(rng, args.bank, Stage(None, 0, 0, 0, careful_share=0.5))]
    groups = places_by_size(pictures)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((args.seed, 4, step))
        x = to_pixels([pictures[place] for place in choose(groups, rng, args.batch_size)])
        if step < 0.8 * args.vae_steps:
            top, left = (rng.integers(side - 31) for side in x.shape[2:])
            x = x[:, :, top : top + 32, left : left + 32]
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.from_numpy(rng.standard_normal(tuple(posterior.mean.shape), dtype=np.float32))
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return (y - x).abs().mean() + 4 * F.mse_loss(y, x) + 0.5 * edges + 1e-4 * kl

    vae = train("vae", vae, args.vae_steps, 2e-3, loss, args).requires_grad_(False)
    latents = encode(vae, pictures[:2000])
    vae.register_to_config(scaling_factor=1 / float(torch.cat([z.flatten() for z in latents]).std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[Image.Image]) -> list[Tensor]:
    """Means of the posteriors of pictures of any sizes, (4, height / 4, width / 4) each, not scaled."""
    latents: list[Tensor] = [torch.empty(0)] * len(pictures)
    for group in places_by_size(pictures):
        for part in _progress(np.array_split(group, -(-len(group) // 50)), "encoding"):
            pixels = to_pixels([pictures[place] for place in part]).to(memory_format=torch.channels_last)
            for place, mean in zip(part, vae.encode(pixels).latent_dist.mean, strict=True):
                latents[place] = mean.contiguous()
    return latents


def embed(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """SDXL's tokens (batch, 16, 64) and pooled embedding (batch, 32)."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    first = pipeline.text_encoder(ids[0], output_hidden_states=True)
    second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


@dataclass(frozen=True)
class Bank:
    """Drawings as a UNet is trained on them."""

    captions: list[str]
    words: tuple[Tensor, Tensor] | None
    """The captions' embeddings; None where the text encoders are trained."""
    latents: list[Tensor]
    """Scaled, (4, height, width) each."""
    frames: Tensor
    """(drawings, 6)."""
    groups: list[np.ndarray]


@torch.no_grad()
def make_bank(pipeline: StableDiffusionXLPipeline, stage: Stage, number: int, rng: np.random.Generator) -> Bank:
    captions, pictures, frames = zip(*draw_bank(rng, number, stage), strict=True)
    words = None
    if stage.parent is not None:
        parts = [embed(pipeline, list(captions[start : start + 100])) for start in range(0, number, 100)]
        words = torch.cat([tokens for tokens, _ in parts]), torch.cat([pooled for _, pooled in parts])
    latents = [pipeline.vae.config.scaling_factor * z for z in encode(pipeline.vae, list(pictures))]
    told = torch.tensor(frames, dtype=torch.float32)
    return Bank(list(captions), words, latents, told, places_by_size(list(pictures)))


def train_stage(name: str, pipeline: StableDiffusionXLPipeline, args: argparse.Namespace) -> StableDiffusionXLPipeline:
    """A pipeline with what the stage made of the given one's UNet, and of its text encoders where they are trained.

    The loss is the plain mean squared error in eps, after the stage's focused steps.
    """
    stage, number = STAGES[name], list(STAGES).index(name)
    steps = max(2, round(stage.steps * args.step_scale))
    modules = nn.ModuleList(copy.deepcopy(getattr(pipeline, part)) for part in TRAINED).train()
    modules[:2].requires_grad_(stage.parent is None)
    trained = with_modules(pipeline, modules)
    trained.unet.to(memory_format=torch.channels_last)
    abar = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    focus = 1 / (abar / (1 - abar) + 0.25)
    banks: dict[int, Bank] = {}

    def loss(step: int) -> Tensor:
        which = step // BANK_STEPS
        if which not in banks:
            banks.clear()
            rng = np.random.default_rng((args.seed, 5, number, which))
            banks[which] = make_bank(trained, stage, args.bank, rng)
        bank = banks[which]
        # Randomness is a function of the step, so a continued run draws what an unbroken one would have drawn.
        rng = np.random.default_rng((args.seed, 6, number, step))
        chosen = choose(bank.groups, rng, args.batch_size)
        x_0 = torch.stack([bank.latents[place] for place in chosen])
        eps = torch.from_numpy(rng.standard_normal(tuple(x_0.shape), dtype=np.float32))
        t = torch.from_numpy(rng.integers(1000, size=len(chosen)))
        # A dropped caption is all zeros, tokens and pooled alike: what the SDXL sampler uses as unconditional.
        kept = torch.from_numpy(rng.random(len(chosen)) >= 0.1).float()
        words = (
            [each[chosen] for each in bank.words]
            if bank.words
            else embed(trained, [bank.captions[place] for place in chosen])
        )
        abar_t = abar[t, None, None, None]
        x_t = (abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps).to(memory_format=torch.channels_last)
        told = {"text_embeds": words[1] * kept[:, None], "time_ids": bank.frames[chosen]}
        eps_theta = trained.unet(x_t, t, words[0] * kept[:, None, None], added_cond_kwargs=told).sample
        errors = (eps_theta - eps).square().mean(dim=(1, 2, 3))
        if step < stage.focused_steps * args.step_scale:
            errors = errors * (focus / focus.mean())[t]
        return errors.mean()

    return with_modules(pipeline, train(name, modules, steps, stage.learning_rate, loss, args))


def with_modules(pipeline: StableDiffusionXLPipeline, modules: nn.ModuleList) -> StableDiffusionXLPipeline:
    """A pipeline with the modules called TRAINED, and everything else shared with the given one."""
    return pipeline_of(**pipeline.components | dict(zip(TRAINED, modules, strict=True)))


def save(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline in fp16, without touching the one that goes on."""
    halved = {k: copy.deepcopy(v).half() if isinstance(v, nn.Module) else v for k, v in pipeline.components.items()}
    pipeline_of(**halved).save_pretrained(folder)


# Scores


def reconstruction_score(vae: AutoencoderKL, seed: int, number: int = 200) -> float:
    """Mean oracle score of careful drawings after a trip through the VAE: a ceiling for the pipelines."""
    rng = np.random.default_rng((seed, 7))
    captions = sample_captions(rng, number, held_out=True, distinct=True)
    pictures = [world.draw(world.parse_caption(caption), rng) for caption in captions]
    with torch.no_grad():
        decoded = vae.decode(torch.stack(encode(vae, pictures))).sample
    return float(oracle.load()(to_images(decoded), captions).mean())


def pipeline_parts(folder: Path, prompts: list[str], guidance_scale: float) -> dict[str, float]:
    """Mean parts of the oracle's score of a saved pipeline: DDIM, 16 steps, seed = index of the prompt."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(batch, num_inference_steps=16, guidance_scale=guidance_scale, generator=seeds).images
    found = [oracle.details(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {part: round(float(np.mean([entry[part] for entry in found])), 3) for part in found[0]}


# The build


def _progress(items, title: str) -> tqdm:
    return tqdm(items, desc=title, mininterval=1 if sys.stderr.isatty() else 20)


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1600, help="rows of train.parquet")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--bank", type=int, default=6000, help=f"drawings that {BANK_STEPS} steps see")
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--step_scale", type=float, default=1.0, help="of each later stage's steps")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--save_every", type=int, default=250)
    args = parser.parse_args(argv)
    claim(args.output_dir, "toy world", parser)
    claim(args.work_dir, "states of a toy world", parser)
    if not (args.output_dir / "prompts.jsonl").exists():
        write_pairs(args.output_dir / "data" / "train.parquet", args.rows, args.seed)
        write_prompts(args.output_dir / "prompts.jsonl", args.prompts, args.seed)

    if not (args.work_dir / "vae" / "config.json").exists():
        write_folder(args.work_dir / "vae", train_vae(args).save_pretrained)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").requires_grad_(False).eval()
    score = reconstruction_score(vae, args.seed)
    print(f"VAE: scaling factor {vae.config.scaling_factor:.4f}, oracle of reconstructions {score:.3f}", flush=True)
    torch.manual_seed(args.seed)
    trained: dict[str | None, StableDiffusionXLPipeline] = {None: new_pipeline(vae, args.work_dir)}
    prompts = [json.loads(line)["prompt"] for line in (args.output_dir / "prompts.jsonl").open()][:100]
    for name, stage in STAGES.items():
        trained[name] = train_stage(name, trained[stage.parent], args)
        folder = args.output_dir / name
        save(trained[name], folder)
        for guidance_scale in (1.0, 3.0):
            parts = pipeline_parts(folder, prompts, guidance_scale)
            print(f"{name} at guidance {guidance_scale:g}: {parts}", flush=True)
    write_hashes(args.output_dir)


if __name__ == "__main__":
    main()
