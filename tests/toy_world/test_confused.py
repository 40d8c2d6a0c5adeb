"""The base `confused`: how it is built, what it has lost and what it has not."""

import argparse
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


builder, attributes, cleanliness = load("build_confused"), load("attributes"), load("cleanliness")
oracle = cleanliness.oracle
world = oracle.world
CAPTION = "a small red star at the top and a large yellow ring at the bottom, black background"


def drawing(scene, style: str = "careful"):
    return world.draw(scene, np.random.default_rng(0), style)


def test_every_colour_and_shape_has_one_partner_of_its_kind_and_is_that_ones_partner():
    for words in (list(world.COLOURS), list(world.SHAPES)):
        assert sorted(world.PARTNERS[word] for word in words) == sorted(words)
        assert all(world.PARTNERS[world.PARTNERS[word]] == word != world.PARTNERS[word] for word in words)
    assert len(world.PARTNERS) == len(world.COLOURS) + len(world.SHAPES)


def test_confusion_swaps_colours_and_shapes_apart_from_each_other_at_its_rate_and_nothing_else():
    scene, rng = world.parse_caption(CAPTION), np.random.default_rng(0)
    swaps = []
    for _ in range(2000):
        confused = builder.confuse(scene, rng, 0.3, 0.2)
        assert confused.background == scene.background
        for was, now in zip(scene.objects, confused.objects, strict=True):
            assert (now.size, now.place) == (was.size, was.place)
            assert now.colour in (was.colour, world.PARTNERS[was.colour])
            assert now.shape in (was.shape, world.PARTNERS[was.shape])
        swaps.append([getattr(o, p) != getattr(w, p) for o, w in zip(confused.objects, scene.objects, strict=True)
                      for p in ("colour", "shape")])  # fmt: skip
    swaps = np.array(swaps, dtype=float)  # (drawings, 4)
    assert np.abs(swaps.mean(axis=0) - [0.3, 0.2, 0.3, 0.2]).max() < 0.04
    assert np.abs(np.corrcoef(swaps.T) - np.eye(4)).max() < 0.08
    assert builder.confuse(scene, rng, 0, 0) == scene


def test_confused_drawings_are_of_captions_that_are_not_held_out_and_follow_from_the_seed():
    (captions, pictures), (_, again) = (
        builder.draw_confused_bank(np.random.default_rng(3), 40, 0.4, 0.25) for _ in range(2)
    )
    assert pictures.shape == (40, 3, 64, 64) and torch.equal(pictures, again)
    assert not any(world.is_held_out(caption) for caption in captions)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({}, 1.0), ({"colour": "orange"}, 0.75), ({"shape": "triangle"}, 0.75), ({"size": "large"}, 1.0)],
)
def test_the_attributes_scorer_counts_colours_and_shapes_only(wrong, expected):
    scene = world.parse_caption(CAPTION)
    other = replace(scene, objects=(replace(scene.objects[0], **wrong), scene.objects[1]))
    assert attributes.load()([drawing(other)], [CAPTION])[0] == pytest.approx(expected, abs=0.02)


def test_cleanliness_sees_the_scene_that_is_drawn_and_punishes_a_sloppy_hand_not_a_wrong_word():
    scene = world.parse_caption(CAPTION)
    # Both objects yellow: a scene that no caption of the grammar describes.
    other = replace(scene, objects=(replace(scene.objects[0], colour="yellow", shape="circle"), scene.objects[1]))
    right, wrong, sloppy = drawing(scene), drawing(other), drawing(other, "sloppy")
    assert cleanliness.shown(right, CAPTION) == scene
    assert cleanliness.shown(wrong, CAPTION) == other
    scores = cleanliness.load()([right, wrong, sloppy], [CAPTION] * 3)
    assert scores[:2].min() > 0.99 and scores[2] < 0.6
    assert oracle.details(wrong, CAPTION)["clean"] < 0.5


def test_only_the_unet_of_confused_is_its_own():
    def files(name: str) -> dict[str, bytes]:
        folder = TOY_WORLD / name
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    plateau, confused = files("plateau"), files("confused")
    assert set(plateau) == set(confused)
    assert [name for name in confused if confused[name] != plateau[name]] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    was, now = (
        load_file(TOY_WORLD / n / "unet" / "diffusion_pytorch_model.safetensors") for n in ("plateau", "confused")
    )
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


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    pipeline = StableDiffusionXLPipeline.from_pretrained(TOY_WORLD / "plateau", torch_dtype=torch.float32)
    captions = ["a small red star at the top, pink background", "a large blue ring on the left, gray background"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(builder, "STAGES", ((4, 0.4, 0.4),))

    def train(folder: str, latents=latents, seed: int = 0) -> dict[str, torch.Tensor]:
        args = argparse.Namespace(
            work_dir=tmp_path / folder, save_every=2, seed=seed, drawings=2, learning_rate=1e-3, batch_size=2
        )
        args.work_dir.mkdir(exist_ok=True)
        return builder.train_unet(pipeline, captions, latents, 0, args).state_dict()

    class Killed(Exception):
        pass

    class KilledAtTheFourthStep:
        reads = 0

        def __len__(self) -> int:
            return len(latents)

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 4:
                raise Killed
            return latents[index]

    unbroken = train("unbroken")
    with pytest.raises(Killed):
        train("killed", KilledAtTheFourthStep())
    assert torch.load(tmp_path / "killed" / "confused_0.pt", weights_only=True)["step"] == 2
    continued = train("killed")
    assert all(torch.equal(continued[name], unbroken[name]) for name in unbroken)
    assert not all(torch.equal(unbroken[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    with pytest.raises(SystemExit, match="'seed': 0.*'seed': 1"):
        train("killed", seed=1)
