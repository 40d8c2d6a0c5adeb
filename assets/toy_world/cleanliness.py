"""How cleanly a picture is drawn, whatever its colours and shapes. A scorer plug-in like `oracle.py`.

The oracle's `clean` compares with the drawing of the caption, so a wrong colour, cleanly drawn, counts as dirt in it.
Here the caption's colours and shapes are first replaced by those that the picture shows.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from spin_diffusion.evaluation.scorers import About

ABOUT = About(
    title="Cleanliness",
    scale="0 to 1: how close the picture is to a careful drawing of the colours and shapes it shows",
    role="aesthetics",
    preprocessing="64 x 64 pixels, RGB",
    text="captions of the toy world's grammar, for places, sizes and background",
    licence="Apache-2.0",
)


def _load_oracle() -> ModuleType:
    """oracle.py beside this file, also when this file is itself loaded by its path."""
    spec = importlib.util.spec_from_file_location("toy_world_oracle", Path(__file__).resolve().with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()
world = oracle.world


def shown(image: Image.Image, caption: str) -> "world.Scene":
    """The caption's scene with the colour and the shape of each object as the picture shows them."""
    scene = world.parse_caption(caption)
    for i, item in enumerate(scene.objects):
        # Colour and shape are judged apart from each other, so one look tries a colour and a shape at once. The
        # caption's own words come first: max keeps them where no other fits better.
        colours = sorted(world.COLOURS, key=lambda word: word != item.colour)
        shapes = sorted(world.SHAPES, key=lambda word: word != item.shape)
        looks = [
            oracle.scene_details(image, _with(scene, i, colour=colour, shape=shape))
            for colour, shape in zip(colours, shapes, strict=True)
        ]
        tries = range(len(looks))
        colour = colours[max(tries, key=lambda k: looks[k]["colour"])]
        scene = _with(scene, i, colour=colour, shape=shapes[max(tries, key=lambda k: looks[k]["shape"])])
    return scene


def _with(scene: "world.Scene", index: int, **words: str) -> "world.Scene":
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **words)
    return replace(scene, objects=tuple(objects))


def load(device: str = "cpu") -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """(images, captions) -> float32 cleanliness (batch,), on the CPU whatever the device."""

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        pairs = zip(images, captions, strict=True)
        return torch.tensor(
            [oracle.scene_details(image, shown(image, caption))["clean"] for image, caption in pairs],
            dtype=torch.float32,
        )

    return score
