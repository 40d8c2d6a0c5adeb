"""How cleanly a picture is drawn, whatever its colour and shape. A scorer plug-in like `oracle.py`.

The oracle's `clean` compares with the drawing of the caption, so a wrong colour, cleanly drawn, counts as dirt in it.
Here the caption's colour and shape are first replaced by those that the picture shows.
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
    scale="0 to 1: how close the picture is to a careful drawing of the colour and shape it shows",
    role="aesthetics",
    preprocessing="the oracle's",
    text="captions of the toy world's grammar, for place, size and background",
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


def shown(seen: "oracle.Seen", caption: str) -> "world.Scene":
    """The caption's scene with the colour and the shape that the picture shows."""
    return oracle.complete(replace(world.parse_caption(caption), colour=None, shape=None), seen)


def load(device: str = "cpu") -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """(images, captions) -> float32 cleanliness (batch,), on the CPU whatever the device."""

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        looks = [(oracle.measure(image), caption) for image, caption in zip(images, captions, strict=True)]
        return torch.tensor([oracle.compare(seen, shown(seen, caption))["clean"] for seen, caption in looks])

    return score
