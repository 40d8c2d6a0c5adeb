"""Tiny random pipelines and data, built in code, so that tests pass through the real `from_pretrained` path offline.

Every `build_*` writes a pipeline folder of 1 to 2 MB that draws 32-px images from 16 x 16 latents. The VAE has factor
2, so code that assumes the usual 8 fails here. Weights depend only on the seed; the caller's random state is kept.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGE_PX = 32
LATENT_PX = 16
TEXT_WIDTH = 32
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
THINGS = ("apple", "boat", "chair", "dragon", "egg", "fox")
PARQUET_ROWS = len(COLOURS) * len(THINGS)


def build_sd1(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline like SD 1.5: epsilon prediction, PNDM. Returns `folder`."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return _build_sd(folder, scheduler, activation="quick_gelu", uses_linear_projection=False, seed=seed)


def build_sd2(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline like SD 2.1: v prediction, zero terminal SNR, DDIM trailing. Returns `folder`."""
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _build_sd(folder, scheduler, activation="gelu", uses_linear_projection=True, seed=seed)


def build_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionXLPipeline: two tokenizers and encoders, text_time, Euler leading. Returns `folder`."""
    tokenizer = build_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
    tokenizer_2 = build_tokenizer(folder / "tokenizer_2", pad="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        time_ids, time_ids_width = 6, 8
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025),
            text_encoder=CLIPTextModel(_text_config(tokenizer, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(
                cross_attention_dim=2 * TEXT_WIDTH,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_ids_width,
                projection_class_embeddings_input_dim=time_ids * time_ids_width + TEXT_WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _build_sd(
    folder: Path, scheduler: PNDMScheduler | DDIMScheduler, activation: str, uses_linear_projection: bool, seed: int
) -> Path:
    tokenizer = build_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_text_config(tokenizer, activation)),
            tokenizer=tokenizer,
            unet=_unet(cross_attention_dim=TEXT_WIDTH, use_linear_projection=uses_linear_projection),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _unet(**family_config: int | str | bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_PX,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        # Attention on the lower level only: the upper one would cost most of the time and teach a test nothing.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **family_config,
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_PX,
        scaling_factor=scaling_factor,
    )


def _text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        # The pooled embedding is read at the end token; a wrong id silently reads it elsewhere.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """Write and load a byte-level CLIP tokenizer of 517 tokens; the end token has the highest id, as in CLIP.

    It is loaded from files because the constructors of transformers 4 and 5 differ and the folder does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bytes_ = _clip_bytes()
    merges = [("r", "e"), ("re", "d</w>"), ("a", "n</w>")]
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    merges_text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(merges_text, encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _clip_bytes() -> list[str]:
    """The 256 printable characters that stand for bytes in CLIP's and GPT-2's vocabularies; '!' comes first (id 0)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(unprintable))]


def write_parquet(path: Path, seed: int = 0, shapes: Sequence[tuple[int, int]] = ((IMAGE_PX, IMAGE_PX),)) -> Path:
    """Write 24 rows with the columns of Pick-a-Pic: distinct captions, no ties, the winner on either side.

    The winner of a row is noise around the colour that its caption names, the loser is grey noise: a test can see which
    image was taken. `label_0` is 1.0 where jpg_0 won and 0.0 where jpg_1 won.

    Args:
        shapes: heights and widths that the rows' images have in turn.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i, (thing, colour) in enumerate((thing, colour) for thing in THINGS for colour in COLOURS):
        shape = shapes[i % len(shapes)]
        winner = _jpeg(np.array(COLOURS[colour]) + rng.normal(0, 12, (*shape, 3)))
        loser = _jpeg(128 + rng.normal(0, 12, (*shape, 1)).repeat(3, axis=2))
        is_first = bool(rng.random() < 0.5) if i > 1 else i == 0  # both sides occur whatever the seed
        rows.append(
            {
                "are_different": True,
                "best_image_uid": f"image-{i}-{0 if is_first else 1}",
                "caption": f"a {colour} {thing}",
                "created_at": "2023-01-01T00:00:00",
                "has_label": True,
                "image_0_uid": f"image-{i}-0",
                "image_0_url": "",
                "image_1_uid": f"image-{i}-1",
                "image_1_url": "",
                "jpg_0": winner if is_first else loser,
                "jpg_1": loser if is_first else winner,
                "label_0": 1.0 if is_first else 0.0,
                "label_1": 0.0 if is_first else 1.0,
                "model_0": "tiny",
                "model_1": "tiny",
                "ranking_id": i,
                "user_id": i,
                "num_example_per_prompt": 1,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def write_prompts(path: Path) -> Path:
    """Write a jsonl file of four prompts, one {"prompt": ...} a line."""
    prompts = [f"a {colour} {thing}" for colour, thing in zip(COLOURS, THINGS, strict=False)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path
