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

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.specs import About, Role, about_part, check_finite, load_part, parse_spec, shortened
from spin_diffusion.input_error import InputError

__all__ = ["About", "LoadedScorer", "Role", "Scorer", "about", "load_scorer", "parse_spec"]


@runtime_checkable
class Scorer(Protocol):
    """(images, prompts) -> one score per image."""

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]: ...


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
                f"the first prompt was {shortened(prompts[0])}"
            )
        scores = scores.detach().float().cpu()
        check_finite(f"scorer {self.name}", scores.tolist(), prompts)
        return scores

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts are longer than what the scorer reads."""
        truncated = getattr(self.score, "truncated", None)
        return truncated(prompts) if truncated else [False] * len(prompts)

    @property
    def features(self) -> Callable[[list[Image.Image]], Float[Tensor, "batch width"]] | None:
        """Image embeddings of length 1, if the scorer has any."""
        return getattr(self.score, "features", None)


def about(spec: str) -> About:
    """What the scorer says of itself, without loading its weights.

    Raises:
        InputError: there is no such scorer.
    """
    return about_part(__name__, spec)


def load_scorer(spec: str, device: str) -> LoadedScorer:
    """The scorer of a `NAME[=PATH]`.

    Args:
        spec: name of a file in this folder without ".py", or path of a .py file (the name is then the file's stem);
            after "=" the weights' file, folder or hub id.
        device: where the scorer's weights go, such as "cpu" or "cuda:0".

    Raises:
        InputError: there is no such scorer, or its weights cannot be used.
    """
    part = load_part(__name__, "scorer", spec, device)
    return LoadedScorer(part.name, part.about, part.call, part.source, part.checkpoint)
