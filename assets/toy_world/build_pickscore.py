"""Build the toy world's PickScore: a tiny CLIP that learns from pairs of drawings which one is preferred, saved in the
layout of PickScore v1, so that the real scorer's code runs on it. About ten minutes on one CPU core:

    python assets/toy_world/build_pickscore.py --output_dir assets/toy_world/pickscore

It learns what PickScore learned: which caption belongs to which drawing (against the batch's other captions and against
the caption with one word changed), and that of two drawings of a caption the careful one is preferred. Captions that
are held out for evaluation are never drawn.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spin_diffusion.store.named import load_module

HERE = Path(__file__).resolve().parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, which the scorer subtracts and divides by."""


build = load_module("", str(HERE / "build.py"))
world = build.world


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 0.3 M parameters that sees 64 x 64 pixels in patches of 8."""
    tower = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 64}
    return CLIPModel(
        CLIPConfig(
            text_config=tower | {
                "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": build.TOKENS,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
            },
            vision_config=tower | {
                "num_hidden_layers": 3, "image_size": 64, "patch_size": 8, "hidden_act": "gelu",
            },
            projection_dim=64,
        )
    )  # fmt: skip


def change_one_word(caption: str, rng: np.random.Generator) -> str:
    """The caption with one of its words changed; what says nothing comes to name a shape."""
    scene = world.parse_caption(caption)
    said = [part for part in world.CHOICES if getattr(scene, part) is not None] or ["shape"]
    part = str(rng.choice(said))
    others = [word for word in world.CHOICES[part] if word != getattr(scene, part)]
    return str(replace(scene, **{part: str(rng.choice(others))}))


def pixels(pictures: Tensor) -> Tensor:
    """uint8 pictures (batch, 3, 64, 64) as CLIP takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Embeddings of length 1, (batch, 64)."""
    ids = tokenizer(captions, padding="longest", return_tensors="pt").input_ids
    return F.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)


def embed_images(clip: CLIPModel, pictures: Tensor) -> Tensor:
    """Embeddings of length 1, (batch, 64)."""
    return F.normalize(clip.get_image_features(pixel_values=pixels(pictures)).pooler_output, dim=-1)


def losses(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], changed: list[str], careful: Tensor,
           sloppy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Which caption (cross entropy in the batch), which word (against the changed caption), which drawing.

    The last is Bradley-Terry of exp(logit_scale) cos, as in Pick-a-Pic (arXiv 2305.01569)."""
    scale = clip.logit_scale.exp()
    texts, others = embed_texts(clip, tokenizer, captions), embed_texts(clip, tokenizer, changed)
    images = embed_images(clip, torch.cat([careful, sloppy]))
    of_careful, of_sloppy = images.chunk(2)
    own = torch.arange(len(captions))
    matching = sum(
        F.cross_entropy(scale * side @ texts.T, own) + F.cross_entropy(scale * texts @ side.T, own)
        for side in (of_careful, of_sloppy)
    )
    right = scale * (images * texts.repeat(2, 1)).sum(1)
    wrong = scale * (images * others.repeat(2, 1)).sum(1)
    preferred = scale * ((of_careful - of_sloppy) * texts).sum(1)
    return matching / 4, F.softplus(wrong - right).mean(), F.softplus(-preferred).mean()


def draw_pairs(rng: np.random.Generator, number: int, held_out: bool) -> tuple[list[str], Tensor, Tensor]:
    """Captions, their careful and their sloppy drawings, uint8 (number, 3, 64, 64)."""
    captions = build.sample_captions(rng, number, held_out=held_out, distinct=held_out)
    scenes = [world.complete(world.parse_caption(caption), rng) for caption in captions]
    careful, sloppy = (
        torch.from_numpy(np.stack([np.asarray(world.draw(scene, rng, style)) for scene in tqdm(scenes, desc=style)]))
        for style in world.STYLES
    )
    return captions, careful.permute(0, 3, 1, 2), sloppy.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracies(clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int) -> dict[str, float]:
    """On 400 held-out captions: how often the careful drawing, and how often the right word, scores higher."""
    rng = np.random.default_rng((seed, 22))
    captions, careful, sloppy = draw_pairs(rng, 400, held_out=True)
    texts = embed_texts(clip, tokenizer, captions)
    others = embed_texts(clip, tokenizer, [change_one_word(c, rng) for c in captions])
    of_careful, of_sloppy = embed_images(clip, careful), embed_images(clip, sloppy)
    return {
        "careful preferred": ((of_careful - of_sloppy) * texts).sum(1).gt(0).float().mean().item(),
        "right word preferred": (of_careful * (texts - others)).sum(1).gt(0).float().mean().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "pickscore")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_size", type=int, default=64, help="captions, each with two drawings")
    parser.add_argument("--captions", type=int, default=8000)
    args = parser.parse_args(argv)
    build.claim(args.output_dir, "toy scorer", parser)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng((args.seed, 21))
    tokenizer = build.write_tokenizer(args.output_dir, "<|endoftext|>")
    clip = new_clip(tokenizer)
    captions, careful, sloppy = draw_pairs(rng, args.captions, held_out=False)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    for _ in (progress := tqdm(range(args.steps), desc="PickScore", mininterval=5)):
        chosen = rng.integers(len(captions), size=args.batch_size)
        index = torch.from_numpy(chosen)
        own = [captions[i] for i in chosen]
        changed = [change_one_word(caption, rng) for caption in own]
        parts = losses(clip, tokenizer, own, changed, careful[index], sloppy[index])
        optimizer.zero_grad()
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(100.0))
        progress.set_postfix_str(" ".join(f"{part.item():.3f}" for part in parts))
    clip.half().save_pretrained(args.output_dir)
    print(json.dumps({k: round(v, 4) for k, v in accuracies(clip.float(), tokenizer, args.seed).items()}))


if __name__ == "__main__":
    main()
