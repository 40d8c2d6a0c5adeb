"""The base `confused`: how it is built, what it has lost and what it has not."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

TOY_WORLD = Path(__file__).resolve().parents[2] / "assets" / "toy_world"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tested_toy_world_{name}", TOY_WORLD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder, attributes, cleanliness = load("build"), load("attributes"), load("cleanliness")
oracle = cleanliness.oracle
world = oracle.world
CAPTION = "a large red star at the top, black background"


def drawing(scene, style: str = "careful"):
    return world.draw(scene, np.random.default_rng(0), style)


def test_every_colour_and_shape_has_one_partner_of_its_kind_and_is_that_ones_partner():
    for words in (list(world.COLOURS), list(world.SHAPES)):
        assert sorted(world.PARTNERS[word] for word in words) == sorted(words)
        assert all(world.PARTNERS[world.PARTNERS[word]] == word != world.PARTNERS[word] for word in words)
    assert len(world.PARTNERS) == len(world.COLOURS) + len(world.SHAPES)


def test_confusion_swaps_a_said_colour_and_shape_apart_from_each_other_at_its_rate_and_nothing_else():
    scene, rng = world.parse_caption(CAPTION), np.random.default_rng(0)
    swaps = []
    for _ in range(2000):
        confused = builder.confuse(scene, rng, 0.3, 0.2)
        assert replace(confused, colour=scene.colour, shape=scene.shape) == scene
        assert confused.colour in ("red", "orange") and confused.shape in ("star", "triangle")
        swaps.append([confused.colour == "orange", confused.shape == "triangle"])
    swaps = np.array(swaps, dtype=float)  # (drawings, 2)
    assert np.abs(swaps.mean(axis=0) - [0.3, 0.2]).max() < 0.04
    assert np.abs(np.corrcoef(swaps.T) - np.eye(2)).max() < 0.08
    open_scene = replace(scene, colour=None, shape=None)
    assert builder.confuse(scene, rng, 0, 0) == scene and builder.confuse(open_scene, rng, 1, 1) == open_scene


@pytest.mark.parametrize(
    ("wrong", "expected"), [({}, 1.0), ({"colour": "orange"}, 0.5), ({"shape": "cross"}, 0.5), ({"size": "small"}, 1.0)]
)
def test_the_attributes_scorer_counts_colour_and_shape_only(wrong, expected):
    other = replace(world.parse_caption(CAPTION), **wrong)
    assert attributes.load()([drawing(other)], [CAPTION])[0] == pytest.approx(expected, abs=0.02)


def test_cleanliness_sees_the_scene_that_is_drawn_and_punishes_a_sloppy_hand_not_a_wrong_word():
    scene = world.parse_caption(CAPTION)
    other = replace(scene, colour="yellow", shape="circle")
    right, wrong, sloppy = drawing(scene), drawing(other), drawing(other, "sloppy")
    assert cleanliness.shown(oracle.measure(right), CAPTION) == scene
    assert cleanliness.shown(oracle.measure(wrong), CAPTION) == other
    scores = cleanliness.load()([right, wrong, sloppy], [CAPTION] * 3)
    assert scores[:2].min() > 0.99 and scores[2] < 0.6
    assert oracle.details(wrong, CAPTION)["clean"] < 0.5


@pytest.mark.parametrize("other", ["sloppy", "confused"])
def test_only_the_unet_of_a_base_is_its_own(other):
    def files(name: str) -> dict[str, bytes]:
        folder = TOY_WORLD / name
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    plateau, trained_on = files("plateau"), files(other)
    assert set(plateau) == set(trained_on)
    different = [name for name in trained_on if trained_on[name] != plateau[name]]
    assert different == ["unet/diffusion_pytorch_model.safetensors"]
    was, now = (load_file(TOY_WORLD / n / "unet" / "diffusion_pytorch_model.safetensors") for n in ("plateau", other))
    assert {k: (v.shape, v.dtype) for k, v in was.items()} == {k: (v.shape, v.dtype) for k, v in now.items()}
    assert {v.dtype for v in now.values()} == {torch.float16}


def test_confused_loses_colours_and_shapes_and_much_less_of_its_clean_hand():
    lines = (TOY_WORLD / "prompts.jsonl").read_text().splitlines()[:24]
    prompts = [json.loads(line)["prompt"] for line in lines]
    found = {}
    for name in ("plateau", "confused"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(TOY_WORLD / name, torch_dtype=torch.float32)
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
        pipeline.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipeline(prompts, num_inference_steps=10, guidance_scale=3.0, generator=seeds).images
        found[name] = [float(module.load()(images, prompts).mean()) for module in (attributes, cleanliness)]
    lost_attributes, lost_cleanliness = np.subtract(found["plateau"], found["confused"])
    assert found["plateau"][0] > 0.85
    assert lost_attributes > 0.1
    assert lost_cleanliness < min(0.1, lost_attributes / 2)
