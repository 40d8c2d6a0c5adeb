"""Prompts as the scorers' text towers read them, and which prompts are longer than that."""

import html
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spin_diffusion.store.input_error import InputError


@dataclass(frozen=True, eq=False)
class ClipText:
    """Token ids for a CLIP text tower: start token, words, end token."""

    tokenizer: Any
    """transformers' CLIPTokenizer."""
    limit: int
    """Tokens that the tower reads, start and end included."""
    clean: Callable[[str], str] | None = None
    """Applied to a prompt first."""
    reads_special_tokens: bool = True
    """Whether "<|endoftext|>" written in a prompt ends it, as in CLIP's processor; otherwise it is plain text."""

    def ids(self, prompts: list[str]) -> Int[Tensor, "batch tokens"]:
        """Ids, filled up with end tokens behind the first one (causal attention never sees them).

        A longer prompt is cut and its last id becomes the end token: the tower is pooled there, and a prompt without
        one would be pooled at its start, whatever it says.
        """
        end = self.tokenizer.eos_token_id
        rows = [row if len(row) <= self.limit else [*row[: self.limit - 1], end] for row in self._rows(prompts)]
        longest = max(map(len, rows))
        return torch.tensor([row + [end] * (longest - len(row)) for row in rows])

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts have words behind the limit, or behind an end token written in the prompt."""
        end = self.tokenizer.eos_token_id
        return [len(row) > self.limit or row.index(end) < len(row) - 1 for row in self._rows(prompts)]

    def _rows(self, prompts: list[str]) -> list[list[int]]:
        texts = [self.clean(prompt) for prompt in prompts] if self.clean else prompts
        # verbose: no warning for long prompts, they are counted
        return self.tokenizer(
            texts, split_special_tokens=not self.reads_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]


@dataclass(frozen=True, eq=False)
class BertText:
    """Token ids for a BERT text tower: [CLS], words, [SEP], always `limit` of them."""

    tokenizer: Any
    """transformers' BertTokenizer."""
    limit: int

    def ids(self, prompts: list[str]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Ids, and a mask that is 1 for tokens and 0 for filling."""
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts have words behind the limit."""
        return [len(row) > self.limit for row in self.tokenizer(prompts, verbose=False)["input_ids"]]


def load_ftfy() -> Any:
    """The package ftfy, with which open_clip's tokenizer mends every prompt first.

    Raises:
        InputError: it is not installed. Curly quotes alone move HPS by 0.06, so there is no score without it.
    """
    try:
        return importlib.import_module("ftfy")
    except ImportError as error:
        raise InputError(
            "it needs the package ftfy, by which its authors mend prompts, and scores of curly quotes differ without: "
            "pip install ftfy"
        ) from error


def clean_like_open_clip(prompt: str) -> str:
    """Broken encodings mended by ftfy, HTML entities resolved twice, white space joined, lower case."""
    return " ".join(html.unescape(html.unescape(load_ftfy().fix_text(prompt))).split()).lower()
