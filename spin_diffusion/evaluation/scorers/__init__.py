"""What judges an image: put one file here with `ABOUT` and `load`; its name is the scorer's name.

    ABOUT: About                                       what a reader of the score must know
    load(device: str, path: str | None) -> Scorer      path: local file or folder, or hub id; None = ABOUT.checkpoint

A scorer takes `images: list[PIL.Image.Image]` and as many `prompts: list[str]` and returns `Float[Tensor, " batch"]`,
one score per image. It may also have

    truncated(prompts) -> list[bool]       which prompts are longer than what it reads
    features(images) -> Float[Tensor, "batch width"]     image embeddings of length 1, for the diversity alarms
    checkpoint: dict[str, str]             what was loaded: file -> SHA-256, say

A module may also have

    BESIDE: tuple[str, ...]      hub ids of what is read when it does not lie at PATH: a tokenizer, a backbone
    places(place: str | None) -> list[str]     every file, folder and hub id that `load` reads, from PATH or, without
                                               one, ABOUT.checkpoint; by default that and BESIDE
    PACKAGES: tuple[str, ...]                  packages whose version decides what is scored

Scores are kept for as long as the scorer is the same: its file, the files that it imports or names beside it, what lies
at its places, and the pictures. When one of them changes, everything is scored anew.

Import heavy packages inside `load`: scorers nobody asks for cost nothing. A file outside of this folder works as well:
name it by a path that ends in ".py"; there `load(device)` is enough. Where weights come from is `NAME=PATH`.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.specs import (
    About,
    Part,
    about_part,
    check_finite,
    guarded,
    load_part,
    parse_spec,
    shortened,
)
from spin_diffusion.store.input_error import InputError, one_line

__all__ = ["About", "LoadedScorer", "Scorer", "about", "load_scorer", "parse_spec"]


@runtime_checkable
class Scorer(Protocol):
    """(images, prompts) -> one score per image."""

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]: ...


@dataclass(eq=False)
class PicturePart(Part):
    """A part that looks at pictures. Where the memory does not hold a batch, it goes on with half of it: nothing that
    is said of a picture depends on the batch."""

    largest_batch: int | None = None
    """Images that the memory held at a time, once it did not hold what was asked for."""

    def _in_batches(self, compute: Callable[..., Tensor], *inputs: list) -> Tensor:
        """Rows of `compute(*inputs)`, in as many parts as the memory asks for."""
        size, start = len(inputs[0]), 0
        rows = []
        while start < size:
            batch = min(self.largest_batch or size, size - start)
            result = _unless_out_of_memory(compute, [given[start : start + batch] for given in inputs])
            if isinstance(result, str):
                self._shrink(batch, result)
            else:
                rows.append(result)
                start += batch
        return torch.cat(rows)

    def _shrink(self, batch: int, reason: str) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if batch == 1:
            raise InputError(f"{self.who}: the memory does not hold a single image ({reason})")
        if self.largest_batch is None:
            print(f"{self.who}: the memory does not hold {batch} images at a time; it goes on with fewer")
        self.largest_batch = batch // 2


_PicturePart = TypeVar("_PicturePart", bound=PicturePart)


@dataclass(eq=False)
class LoadedScorer(PicturePart):
    """A scorer that checks what it returns, runs without gradients and gives fp32 on the CPU."""

    kind = "scorer"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One score per image.

        Raises:
            InputError: it failed, gave anything but one finite score per image, or no memory holds a single image.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{self.who}: {len(images)} images do not match {len(prompts)} prompts")
        if not images:
            return torch.zeros(0)
        scores = guarded(self.who, self._in_batches, self._checked, images, prompts)
        check_finite(self.who, scores.tolist(), prompts)
        return scores

    def _checked(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        scores = self.score(images, prompts)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != (len(images),):
            raise InputError(
                f"{self.who} must return a tensor of shape ({len(images)},), got {shape}; "
                f"the first prompt was {shortened(prompts[0])}"
            )
        return scores.detach().float().cpu()

    @property
    def features(self) -> Callable[[list[Image.Image]], Float[Tensor, "batch width"]] | None:
        """Image embeddings of length 1, if the scorer has any."""
        features = getattr(self.score, "features", None)
        return features and partial(guarded, self.who, self._in_batches, features)


def _unless_out_of_memory(run: Callable[..., Any], arguments: list) -> Any | str:
    """What it returns, or what was said when the memory ran out: the error itself would hold on to the tensors."""
    try:
        return run(*arguments)
    except RuntimeError as error:
        reason = str(error)
        # Not every library raises torch's own class, and the CPU's allocator does not
        words = ("out of memory", "can't allocate memory")
        if isinstance(error, torch.OutOfMemoryError) or any(word in reason.lower() for word in words):
            return one_line(error)
        raise


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
    return load_picture_part(LoadedScorer, __name__, spec, device)


def load_picture_part(kind: type[_PicturePart], package: str, spec: str, device: str) -> _PicturePart:
    """A part that looks at pictures, by its `NAME[=PATH]` in `package`. Raises InputError as `load_scorer`."""
    who = f"{kind.kind} {parse_spec(spec)[0]}"
    loaded = guarded(who, _unless_out_of_memory, load_part, [kind, package, spec, device])
    if isinstance(loaded, str):
        raise InputError(f"{who}: the memory of {device} does not hold its weights ({loaded})")
    return loaded
