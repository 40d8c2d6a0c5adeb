"""What judges an answer: put one file here with `ABOUT` and `load`; its name is the scorer's name.

    ABOUT: About                                     what a reader of the score must know
    load(device: str, path: str | None) -> Judge     path: local folder or hub id; None = ABOUT.checkpoint

A judge takes `answers: list[Answer]` and `log_likelihood`, which asks the very model that gave the answers, and returns
one number per answer. It may also have

    truncated(answers) -> list[bool]       which answers are longer, with their prompts, than what it reads
    checkpoint: dict[str, str]             what was loaded: file -> SHA-256, say

Import heavy packages inside `load`. A file outside of this folder works as well: name it by a path that ends in ".py";
there `load(device)` is enough. Where weights come from is `NAME=PATH`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from spin_diffusion.evaluation.specs import About, Part, check_finite, guarded, load_part, parse_spec
from spin_diffusion.store.input_error import InputError

__all__ = ["About", "Answer", "Judge", "LoadedJudge", "LogLikelihood", "load_judge"]

LogLikelihood = Callable[[list[str], list[str]], list[float]]
"""(prompts, completions) -> log p(completion and end token | prompt) in nats, by the model that is evaluated. Prompts
are those of `Answer.prompt`."""


@dataclass(frozen=True)
class Answer:
    """An answer that a model gave to a prompt."""

    id: str
    """The id of the prompt."""
    k: int
    """Number of the answer, from 0."""
    prompt: str
    text: str
    reference: str | None
    """The real answer, if the data has one."""
    finish: Literal["stop", "length"]
    """"stop" = it ended by itself; "length" = it was cut at the longest answer allowed."""
    num_tokens: int
    """Tokens of the model's own tokenizer, with the end token if it was drawn."""


@runtime_checkable
class Judge(Protocol):
    """(answers, log-likelihood of the model that gave them) -> one score per answer, higher = better."""

    def __call__(self, answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]: ...


@dataclass(eq=False)
class LoadedJudge(Part):
    """A judge that checks what it returns and runs without gradients."""

    kind = "judge"

    @torch.no_grad()
    def __call__(self, answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
        """One score per answer.

        Raises:
            InputError: it failed, or gave anything but one finite number per answer.
        """
        if not answers:
            return []
        scores = guarded(self.who, self.score, answers, log_likelihood)
        if not isinstance(scores, list) or len(scores) != len(answers):
            got = f"{len(scores)} of them" if isinstance(scores, list) else type(scores).__name__
            raise InputError(f"{self.who} must return a list of {len(answers)} numbers, got {got}")
        if odd := [type(score).__name__ for score in scores if not isinstance(score, int | float)]:
            raise InputError(f"{self.who} must return numbers, got {odd[0]}")
        scores = [float(score) for score in scores]
        check_finite(self.who, scores, [answer.prompt for answer in answers])
        return scores


def load_judge(spec: str, device: str) -> LoadedJudge:
    """The judge of a `NAME[=PATH]`.

    Args:
        spec: name of a file in this folder without ".py", or path of a .py file (the name is then the file's stem);
            after "=" the weights' folder or hub id.
        device: where the judge's weights go, such as "cpu" or "cuda:0".

    Raises:
        InputError: there is no such judge, or its weights cannot be used.
    """
    return guarded(f"judge {parse_spec(spec)[0]}", load_part, LoadedJudge, __name__, spec, device)
