import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from tests import tiny

FAMILIES = {"sd1_dir": "StableDiffusionPipeline", "sd2_dir": "StableDiffusionPipeline"}
FAMILIES["sdxl_dir"] = "StableDiffusionXLPipeline"


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, prompt: str, **arguments: float) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", **arguments).images


@pytest.mark.parametrize("fixture", FAMILIES)
def test_a_pipeline_loads_back_and_draws(fixture: str, request: pytest.FixtureRequest) -> None:
    pipeline = load(request.getfixturevalue(fixture))
    assert type(pipeline).__name__ == FAMILIES[fixture]
    assert pipeline.vae_scale_factor == 2
    image = draw(pipeline, "a red fox")
    assert image.shape == (1, tiny.IMAGE_PX, tiny.IMAGE_PX, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01, "a constant image would hide mistakes"


@pytest.mark.parametrize("fixture", FAMILIES)
def test_the_prompt_reaches_the_unet(fixture: str, request: pytest.FixtureRequest) -> None:
    pipeline = load(request.getfixturevalue(fixture))
    assert np.abs(draw(pipeline, "a red fox") - draw(pipeline, "a blue boat")).max() > 1e-5


def test_other_sizes_work(sdxl_dir: Path) -> None:
    assert draw(load(sdxl_dir), "a red fox", height=48, width=64).shape == (1, 48, 64, 3)


def test_the_schedulers_say_what_is_predicted(sd1_dir: Path, sd2_dir: Path, sdxl_dir: Path) -> None:
    schedulers = [
        DDPMScheduler.from_pretrained(folder, subfolder="scheduler") for folder in (sd1_dir, sd2_dir, sdxl_dir)
    ]
    assert [s.config.prediction_type for s in schedulers] == ["epsilon", "v_prediction", "epsilon"]
    assert [bool(s.alphas_cumprod[-1] == 0) for s in schedulers] == [False, True, False]


def test_sdxl_has_two_tokenizers_with_their_own_padding(sdxl_dir: Path) -> None:
    pipeline = load(sdxl_dir)
    assert pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id == len(pipeline.tokenizer) - 1
    assert pipeline.tokenizer_2.pad_token_id == 0
    assert pipeline.config.force_zeros_for_empty_prompt is True


def test_a_prompt_becomes_start_bytes_end_and_is_cut_at_77(sd1_dir: Path) -> None:
    tokenizer = load(sd1_dir).tokenizer
    ids = tokenizer("red fox").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 2 + 1 + 3, "'red' is one merged token, 'fox' three"
    assert len(tokenizer("fox " * 100, truncation=True).input_ids) == 77


def test_weights_depend_on_the_seed_only(tmp_path: Path, sd1_dir: Path) -> None:
    before = torch.get_rng_state()
    again, other = tiny.build_sd1(tmp_path / "again"), tiny.build_sd1(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (sd1_dir / weights).read_bytes() != (other / weights).read_bytes()


def test_the_parquet_file_has_coloured_winners_on_both_sides(tiny_parquet: Path) -> None:
    rows = pq.read_table(tiny_parquet).to_pylist()
    assert len(rows) == tiny.PARQUET_ROWS == len({row["caption"] for row in rows}) == 24
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    for row in rows:
        winner, loser = ("jpg_0", "jpg_1") if row["label_0"] == 1.0 else ("jpg_1", "jpg_0")
        colours = [np.asarray(Image.open(io.BytesIO(row[side])), float).mean((0, 1)) for side in (winner, loser)]
        assert np.ptp(colours[0]) > 100 and np.ptp(colours[1]) < 10
        assert row["best_image_uid"] == row[f"image_{winner[-1]}_uid"]


def test_the_prompts_file_has_one_prompt_a_line(tiny_prompts: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in tiny_prompts.read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) == 4
