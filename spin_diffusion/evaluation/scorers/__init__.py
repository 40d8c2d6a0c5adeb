"""What judges an image: put one file here with `ABOUT` and `load`; its name is the scorer's name.

    ABOUT: About                                       what a reader of the score must know
    load(device: str, path: str | None) -> Scorer      path: local file or folder, or hub id; None = ABOUT.checkpoint

A scorer takes `images: list[PIL.Image.Image]` and as many `prompts: list[str]` and returns `Float[Tensor, " batch"]`,
one score per image. It may also have

    truncated(prompts) -> list[bool]       which prompts are longer than what it reads
    features(images) -> Float[Tensor, "batch width"]     image embeddings of length 1, for the diversity alarms
    checkpoint: dict[str, str]             what was loaded: file -> SHA-256, say

Import heavy packages inside `load`: scorers nobody asks for cost nothing. A file outside of this folder works as well:
name it by a path that ends in ".py"; there `load(device)` is enough. Where weights come from is `NAME=PATH`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.input_error import InputError
from spin_diffusion.named import load_module, load_named

Role = Literal["truth", "in-domain", "held-out", "alignment", "aesthetics", "drift"]
"""What a score can say: the truth (an oracle of a drawn world); what a preference model thinks that was trained on the
data the player learns from, or one that was trained on other data; agreement with the prompt; beauty, whatever the
prompt; drift, which is good neither up nor down."""


@runtime_checkable
class Scorer(Protocol):
    """(images, prompts) -> one score per image."""

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]: ...


@dataclass(frozen=True)
class About:
    """What a reader of a score must know."""

    title: str
    """As papers call it."""
    scale: str
    """Formula, unit and usual values."""
    role: Role = "held-out"
    """All but "drift" are better when higher."""
    checkpoint: str | None = None
    """Hub id that is loaded when no path is given."""
    preprocessing: str = ""
    """How pixels reach the model."""
    text: str = ""
    """How prompts reach the model, and how much of them it reads."""
    licence: str = ""
    """Of the weights."""
    citation: str = ""
    """arXiv id or address."""


@dataclass(frozen=True, eq=False)
class LoadedScorer:
    """A scorer that checks what it returns, runs without gradients and gives fp32 on the CPU."""

    name: str
    about: About
    score: Scorer
    source: str
    """Where its weights came from; empty = it has none."""
    checkpoint: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One score per image.

        Raises:
            InputError: anything but one finite score per image.
        """
        if len(images) != len(prompts):
            raise ValueError(f"scorer {self.name}: {len(images)} images do not match {len(prompts)} prompts")
        if not images:
            return torch.zeros(0)
        scores = self.score(images, prompts)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != (len(images),):
            raise InputError(
                f"scorer {self.name} must return a tensor of shape ({len(images)},), got {shape}; "
                f"the first prompt was {_shortened(prompts[0])}"
            )
        scores = scores.detach().float().cpu()
        for score, prompt in zip(scores.tolist(), prompts, strict=True):
            if not math.isfinite(score):
                raise InputError(f"scorer {self.name} returned {score} for the prompt {_shortened(prompt)}")
        return scores

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts are longer than what the scorer reads."""
        truncated = getattr(self.score, "truncated", None)
        return truncated(prompts) if truncated else [False] * len(prompts)

    @property
    def features(self) -> Callable[[list[Image.Image]], Float[Tensor, "batch width"]] | None:
        """Image embeddings of length 1, if the scorer has any."""
        return getattr(self.score, "features", None)


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Name of the score, module to load, and where its weights are, of `NAME[=PATH]` or `FILE.py[=PATH]`."""
    module, _, path = spec.partition("=")
    return Path(module).stem if module.endswith(".py") else module, module, path or None


def about(spec: str) -> About:
    """What the scorer says of itself, without loading its weights.

    Raises:
        InputError: there is no such scorer.
    """
    name, module, _ = parse_spec(spec)
    return getattr(load_module(__name__, module), "ABOUT", About(title=name, scale="as its file says"))


def load_scorer(spec: str, device: str) -> LoadedScorer:
    """The scorer of a `NAME[=PATH]`.

    Args:
        spec: name of a file in this folder without ".py", or path of a .py file (the name is then the file's stem);
            after "=" the weights' file, folder or hub id.
        device: where the scorer's weights go, such as "cpu" or "cuda:0".

    Raises:
        InputError: there is no such scorer, or its weights cannot be used.
    """
    name, module, path = parse_spec(spec)
    load = load_named(__name__, module, "load")
    scorer = load(device, path) if path or not module.endswith(".py") else load(device)
    if not callable(scorer):
        raise InputError(f"scorer {name}: load({device!r}) must return a function, got {type(scorer).__name__}")
    said = about(spec)
    return LoadedScorer(name, said, scorer, path or said.checkpoint or "", getattr(scorer, "checkpoint", {}))


def _shortened(prompt: str, length: int = 80) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
