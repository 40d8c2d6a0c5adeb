"""The toy world: its grammar, its drawings, its oracle, and what the build wrote beside them."""

import hashlib
import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

TOY_WORLD = Path(__file__).resolve().parents[2] / "assets" / "toy_world"
PICK_A_PIC_COLUMNS = [
    "are_different",
    "best_image_uid",
    "caption",
    "created_at",
    "has_label",
    "image_0_uid",
    "image_0_url",
    "image_1_uid",
    "image_1_url",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "model_0",
    "model_1",
    "ranking_id",
    "user_id",
    "num_example_per_prompt",
    "__index_level_0__",
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tested_toy_world_{name}", TOY_WORLD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = load("oracle")
world = oracle.world


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = np.random.default_rng(7)
    return [world.sample_caption(rng) for _ in range(60)]


def drawings(captions: list[str], style: str, seed: int = 0) -> list[Image.Image]:
    """Of every size in turn."""
    rng, sizes = np.random.default_rng(seed), list(world.SIZES_PX)
    return [world.draw(world.parse_caption(c), rng, style, sizes[i % len(sizes)]) for i, c in enumerate(captions)]


def train_rows() -> dict[str, list]:
    return pq.read_table(TOY_WORLD / "data" / "train.parquet").to_pydict()


def held_out_prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in (TOY_WORLD / "prompts.jsonl").read_text().splitlines()]


def test_every_sampled_caption_parses_back_to_itself_and_leaves_each_part_open_in_one_of_four():
    rng = np.random.default_rng(0)
    captions = [world.sample_caption(rng) for _ in range(1000)]
    scenes = [world.parse_caption(caption) for caption in captions]
    assert [str(scene) for scene in scenes] == captions
    for part in world.CHOICES:
        assert 0.2 < np.mean([getattr(scene, part) is None for scene in scenes]) < 0.3


@pytest.mark.parametrize(
    "caption", ["a photo of a dog", "a red small circle", "a red", "a circle and a ring", "a ring, background white"]
)
def test_a_caption_outside_the_grammar_is_an_error_that_names_the_grammar(caption):
    with pytest.raises(ValueError, match="grammar"):
        oracle.load()([Image.new("RGB", (64, 64))], [caption])


@pytest.mark.parametrize("style", world.STYLES)
def test_a_drawing_is_a_function_of_caption_and_seed(captions, style):
    first, again, other = (drawings(captions[:10], style, seed) for seed in (3, 3, 4))
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert [p.tobytes() for p in first] != [p.tobytes() for p in other]
    assert {p.size for p in first} == set(world.SIZES_PX) and {p.mode for p in first} == {"RGB"}


def test_what_a_caption_leaves_open_differs_from_drawing_to_drawing_and_the_oracle_takes_any():
    caption, rng = "a shape", np.random.default_rng(0)
    pictures = [world.draw(world.parse_caption(caption), rng) for _ in range(60)]
    seen = [oracle.measure(picture) for picture in pictures]
    scenes = [oracle.complete(world.parse_caption(caption), look) for look in seen]
    for part, words in (("size", 2), ("colour", 6), ("shape", 6), ("background", 5)):
        assert len({getattr(scene, part) for scene in scenes}) == words
    centres = np.array([look.centre_px for look in seen])
    assert (centres.min(axis=0) < 21).all() and (centres.max(axis=0) > 43).all()
    assert oracle.load()(pictures, [caption] * 60).min() > 0.99
    # The same pictures are judged by every word that is said.
    for said in ("a small shape", "a red shape", "a circle", "a shape, white background"):
        scores = oracle.load()(pictures, [said] * 60)
        assert scores.min() < 0.9 < 0.99 < scores.max()


def test_an_object_stands_where_its_caption_says_in_every_size():
    rng = np.random.default_rng(0)
    for size_px in world.SIZES_PX:
        for place in world.PLACES:
            scene = world.parse_caption(f"a small red circle {place}, white background")
            looks = [oracle.measure(world.draw(scene, rng, "careful", size_px)) for _ in range(5)]
            away = np.array([look.centre_px - world.centre(place, size_px) for look in looks])
            assert np.abs(away).max() < 1.3
            others = [str(replace(scene, place=other)) for other in world.PLACES if other != place]
            assert all(oracle.compare(looks[0], world.parse_caption(other))["place"] < 0.2 for other in others)


def test_an_unknown_style_is_an_error(captions):
    with pytest.raises(ValueError, match="careful"):
        world.draw(world.parse_caption(captions[0]), np.random.default_rng(0), "baroque")


def test_the_oracle_ranks_careful_above_sloppy_above_the_picture_of_another_caption(captions):
    score = oracle.load("cpu")
    careful, sloppy = (score(drawings(captions, style), captions) for style in world.STYLES)
    other = score(drawings(captions[1:] + captions[:1], "careful"), captions)
    assert careful.dtype == torch.float32 and careful.shape == (60,)
    assert careful.min() > 0.99
    assert 0.6 < sloppy.mean() < 0.8
    assert other.mean() < 0.3
    assert (careful > sloppy).all()
    assert all(0 <= s.min() and s.max() <= 1 for s in (careful, sloppy, other))


def test_a_blank_picture_scores_low_on_every_background(captions):
    for colour in world.BACKGROUNDS.values():
        assert oracle.load()([Image.new("RGB", (64, 64), colour)] * 60, captions).max() < 0.31


def test_the_oracle_barely_minds_jpeg(captions):
    def compressed(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return Image.open(buffer)

    assert oracle.load()([compressed(p) for p in drawings(captions, "careful")], captions).mean() > 0.96


@pytest.mark.parametrize(
    ("part", "wrong"),
    [("colour", "blue"), ("shape", "square"), ("size", "small"), ("place", "on the right"), ("background", "pink")],
)
def test_each_single_wrong_word_lowers_its_part_and_the_score_and_an_unsaid_one_nothing(part, wrong):
    caption = "a large red circle on the left, white background"
    scene = world.parse_caption(caption)
    picture = world.draw(replace(scene, **{part: wrong}), np.random.default_rng(1))
    right = oracle.details(world.draw(scene, np.random.default_rng(1)), caption)
    found, open_ = (oracle.details(picture, str(s)) for s in (scene, replace(scene, **{part: None})))
    assert found[part] < 0.2 < 0.99 < min(right[part], open_[part], open_["score"])
    assert found["score"] < right["score"] - 0.15


def test_more_noise_means_a_lower_score():
    caption = "a large yellow star at the bottom, black background"
    clean = np.asarray(world.draw(world.parse_caption(caption), np.random.default_rng(0)), dtype=np.float32)
    noise = np.random.default_rng(1).normal(size=clean.shape)
    noisy = [Image.fromarray(np.clip(clean + std * noise, 0, 255).astype(np.uint8)) for std in (0, 4, 8, 16, 24)]
    scores = oracle.load()(noisy, [caption] * len(noisy))
    assert (scores.diff() < 0).all()


def test_the_held_out_prompts_are_disjoint_from_training_captions():
    prompts, captions = held_out_prompts(), train_rows()["caption"]
    assert len(set(prompts)) == len(prompts) == 200
    assert not set(prompts) & set(captions)
    # The base pipelines never saw a drawing of a held-out caption; this predicate is what kept them apart.
    assert all(world.is_held_out(prompt) for prompt in prompts)
    assert not any(world.is_held_out(caption) for caption in captions)


def test_the_parquet_has_pick_a_pics_columns_and_the_careful_drawing_wins():
    rows = train_rows()
    assert list(rows) == PICK_A_PIC_COLUMNS
    assert len(rows["caption"]) == 1600
    first_wins = 0
    for i in range(1600):
        labels = (rows["label_0"][i], rows["label_1"][i])
        if labels == (0.5, 0.5):
            assert not rows["are_different"][i]
            continue
        winner = labels.index(1.0)
        first_wins += winner == 0
        assert labels[1 - winner] == 0.0
        assert rows[f"model_{winner}"][i] == "careful" and rows[f"model_{1 - winner}"][i] == "sloppy"
        assert rows["best_image_uid"][i] == rows[f"image_{winner}_uid"][i]
    assert 600 < first_wins < 1000


def test_the_pairs_are_jpegs_that_the_oracle_tells_apart():
    rows = train_rows()
    chosen = [i for i in range(60) if rows["label_0"][i] != 0.5][:40]
    scores = {}
    for style in world.STYLES:
        jpgs = [rows["jpg_0" if rows["model_0"][i] == style else "jpg_1"][i] for i in chosen]
        assert all(jpg[:2] == b"\xff\xd8" for jpg in jpgs)
        pictures = [Image.open(io.BytesIO(jpg)) for jpg in jpgs]
        scores[style] = oracle.load()(pictures, [rows["caption"][i] for i in chosen])
    assert (scores["careful"] > scores["sloppy"]).all()


def test_the_hashes_are_those_of_the_files():
    hashes = json.loads((TOY_WORLD / "hashes.json").read_text())
    assert {"prompts.jsonl", "data/train.parquet", "sloppy/model_index.json", "plateau/model_index.json"} <= set(hashes)
    folders = ("data", "sloppy", "plateau", "confused", "pickscore")
    files = {p.relative_to(TOY_WORLD).as_posix() for f in folders for p in (TOY_WORLD / f).rglob("*") if p.is_file()}
    assert set(hashes) == files | {"prompts.jsonl"}
    for name, digest in hashes.items():
        assert hashlib.sha256((TOY_WORLD / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("name", ["sloppy", "plateau", "confused"])
def test_a_pipeline_is_small_and_loads_through_from_pretrained(name):
    from diffusers import StableDiffusionXLPipeline

    folder = TOY_WORLD / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6_000_000
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    prompt = held_out_prompts()[0]
    words = prompt.replace(",", " ,").split()
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        # Every word of the grammar is one token, between the start and the end token.
        assert len(tokenizer(prompt).input_ids) == len(words) + 2
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (64, 64)


def test_the_toy_pickscore_is_loaded_by_the_real_scorer_and_prefers_careful_drawings_and_right_captions() -> None:
    from spin_diffusion.evaluation.scorers import load_scorer

    scorer = load_scorer(f"pickscore={TOY_WORLD / 'pickscore'}", "cpu")
    prompts = [json.loads(line)["prompt"] for line in (TOY_WORLD / "prompts.jsonl").open()][:60]
    rng = np.random.default_rng(3)
    careful = [world.draw(world.parse_caption(prompt), rng) for prompt in prompts]
    sloppy = [world.draw(world.parse_caption(prompt), rng, "sloppy") for prompt in prompts]
    right = scorer(careful, prompts)
    assert (right > scorer(sloppy, prompts)).float().mean() > 0.95
    assert (right > scorer(careful, prompts[1:] + prompts[:1])).float().mean() > 0.95
    assert scorer.features(careful[:2]).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert not any(scorer.truncated(prompts))
