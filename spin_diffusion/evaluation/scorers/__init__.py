"""What judges an image: put one file here with `load(device: str) -> Scorer`; its name is the scorer's name.

A scorer takes `images: list[PIL.Image.Image]` and as many `prompts: list[str]` and returns `Float[Tensor, " batch"]`,
one score per image; higher is better. Import heavy packages inside `load`: scorers nobody asks for cost nothing. A file
outside of this folder works as well: name it by a path that ends in ".py".
"""

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.input_error import InputError
from spin_diffusion.named import load_named


@runtime_checkable
class Scorer(Protocol):
    """(images, prompts) -> one score per image; higher is better."""

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]: ...


def load_scorer(spec: str, device: str) -> tuple[str, Scorer]:
    """Name and scorer; the scorer checks what it returns, runs without gradients and gives fp32 on the CPU.

    Args:
        spec: name of a file in this folder without ".py", or path of a .py file; the name is the file's stem.
        device: where the scorer's weights go, such as "cpu" or "cuda:0".

    Raises:
        InputError: there is no such scorer; or, when it is called, it returns anything but one finite score per image.
    """
    load = load_named(__name__, spec, "load")
    name = Path(spec).stem
    scorer = load(device)
    if not callable(scorer):
        raise InputError(f"scorer {name}: load({device!r}) must return a function, got {type(scorer).__name__}")
    return name, _checked(name, scorer)


def _checked(name: str, scorer: Scorer) -> Scorer:
    @torch.no_grad()
    def checked_scorer(images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        if len(images) != len(prompts):
            raise ValueError(f"scorer {name}: {len(images)} images do not match {len(prompts)} prompts")
        if not images:
            return torch.zeros(0)
        scores = scorer(images, prompts)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != (len(images),):
            raise InputError(
                f"scorer {name} must return a tensor of shape ({len(images)},), got {shape}; "
                f"the first prompt was {_shortened(prompts[0])}"
            )
        scores = scores.detach().float().cpu()
        for score, prompt in zip(scores.tolist(), prompts, strict=True):
            if not math.isfinite(score):
                raise InputError(f"scorer {name} returned {score} for the prompt {_shortened(prompt)}")
        return scores

    return checked_scorer


def _shortened(prompt: str, length: int = 80) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
