"""The oracle's colour and shape alone: what the base `confused` has lost. A scorer plug-in like `oracle.py`."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from spin_diffusion.evaluation.scorers import About

ABOUT = About(
    title="Attributes",
    scale="0 to 1: how far the picture shows the caption's colour and shape",
    role="truth",
    preprocessing="the oracle's",
    text="captions of the toy world's grammar",
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


def load(device: str = "cpu") -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """(images, captions) -> float32 means of the oracle's colour and shape (batch,), on the CPU whatever the device."""

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        found = [oracle.details(image, caption) for image, caption in zip(images, captions, strict=True)]
        return torch.tensor([(entry["colour"] + entry["shape"]) / 2 for entry in found], dtype=torch.float32)

    return score
